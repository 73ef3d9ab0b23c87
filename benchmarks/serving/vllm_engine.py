# SPDX-License-Identifier: Apache-2.0
"""Measures `vllm serve` on one checkpoint."""

from __future__ import annotations

import tempfile
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

    def run(self, log: Path, vocabulary: int, restart: bool) -> dict[str, Any]:
        """The figures of ``workload.measure``, seconds to start with empty caches, with ``restart``
        also those to start again with what that left, and peak memory.

        Raises RuntimeError with vLLM's own errors if it does not start.
        """
        with tempfile.TemporaryDirectory(dir=log.parent, prefix="cache-") as cache:
            environment = {
                "HF_HUB_OFFLINE": "1",
                "VLLM_CACHE_ROOT": cache,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                **dict(self.variables),
            }
            first = self._served(log, environment, vocabulary)
            if not restart:
                return first
            started = time.perf_counter()
            with serving(self.model, NAME, log, environment, self._options()):
                again = time.perf_counter() - started
        return {**first, "start_again_s": again}

    def _options(self) -> list[str]:
        options = ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(max(STREAMS))]
        options += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        if self.quantization:
            options += ["--quantization", self.quantization]
        return options

    def _served(self, log: Path, environment: dict[str, str], vocabulary: int) -> dict[str, Any]:
        started = time.perf_counter()
        with (
            watched_children() as peak,
            serving(self.model, NAME, log, environment, self._options()) as url,
        ):
            start = time.perf_counter() - started
            figures = measure(Client(url, NAME).answer, vocabulary)
        return {"start_s": start, **figures, "peak_anonymous_bytes": peak.bytes}
