# SPDX-License-Identifier: Apache-2.0
"""Measures `vllm serve` on one checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.client import Client
from benchmarks.serving.memory import watched_children
from benchmarks.serving.workload import CONTEXT, STREAMS, measure
from server import serving

NAME = "model"


@dataclass(frozen=True)
class VllmEngine:
    """``model``: the checkpoint's directory. ``variables``: of the environment, on top of what
    all engines get. ``quantization``: what the user passes for it, or ""."""

    name: str
    model: Path
    variables: tuple[tuple[str, str], ...] = ()
    quantization: str = ""

    def run(self, log: Path, vocabulary: int) -> dict[str, Any]:
        """The figures of ``workload.measure``, seconds to start, and peak memory.

        Raises RuntimeError with vLLM's own errors if it does not start.
        """
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **dict(self.variables),
        }
        options = ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(max(STREAMS))]
        options += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        if self.quantization:
            options += ["--quantization", self.quantization]
        started = time.perf_counter()
        with (
            watched_children() as peak,
            serving(self.model, NAME, log, environment, options) as url,
        ):
            start = time.perf_counter() - started
            figures = measure(Client(url, NAME).answer, vocabulary)
        return {"start_s": start, **figures, "peak_anonymous_bytes": peak.bytes}
