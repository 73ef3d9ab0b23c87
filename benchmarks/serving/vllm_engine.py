# SPDX-License-Identifier: Apache-2.0
"""Measures `vllm serve` on one checkpoint."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.serving.client import Client
from benchmarks.serving.memory import watched_children
from benchmarks.serving.workload import CONTEXT, STREAMS, measure
from server import serving
from vllm.compressed_linear import settings
from vllm.compressed_linear.prepare.plan import CACHE_HIT

NAME = "model"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What every vLLM gets."""


def preparation(plan: Path) -> dict[str, Any]:
    """What the plan that this package wrote says of the weights: seconds until they lay as its
    kernels want them, layers, and how many of these came from the cache of prepared weights."""
    layers = [x for x in json.loads(plan.read_text())["layers"] if x["bytes_prepared"]]
    return {
        "prepare_s": sum(layer["prepare_seconds"] for layer in layers),
        "layers": len(layers),
        "from_cache": sum(layer["cache"] == CACHE_HIT for layer in layers),
    }


def kernels(plan: Path) -> dict[str, int]:
    """Backend and code path of each layer that the plan names, and how many layers have it."""
    layers = json.loads(plan.read_text())["layers"]
    return dict(Counter(f"{x['backend']} ({x['variant']})".replace(" ()", "") for x in layers))


def selected(log: str) -> list[str]:
    """The kernel classes for linear layers that vLLM said it chose."""
    return sorted(set(re.findall(r"Selected (\w+) for", log)))


def last_error(log: str) -> str:
    """What the last exception in a log said, in one line; empty if there is none."""
    found = re.findall(r"^(?:\[rank\d+\]: )?(\w+Error: .+)$", log, re.MULTILINE)
    return found[-1].strip() if found else ""


def _plan_beside(log: Path) -> Path:
    return log.with_suffix(".plan.json")


@dataclass(frozen=True)
class VllmEngine:
    """``model``: the checkpoint's directory. ``variables``: of the environment, on top of what
    all engines get. ``quantization``: what the user passes for it, or "". ``server``: asked over
    HTTP, else in one process; then its start is not measured."""

    name: str
    model: Path
    variables: tuple[tuple[str, str], ...] = ()
    quantization: str = ""
    server: bool = True

    def run(self, log: Path, vocabulary: int, *, restart: bool, tokens: int) -> dict[str, Any]:
        """The figures of ``workload.measure``, seconds to start with empty caches, with ``restart``
        also those to start again with what that left, and peak memory.

        Both caches count: vLLM's of compiled code, and this package's of prepared weights. Raises
        RuntimeError with vLLM's own errors if it does not start, or if the second start did not
        find the weights that the first one prepared.
        """
        if not self.server:
            figures = self.worker("vllm_worker", log, str(tokens))
            if self.ours:
                return figures | {"kernels": kernels(_plan_beside(log))}
            return figures | {"selected": selected(log.read_text(errors="replace"))}
        with tempfile.TemporaryDirectory(dir=log.parent, prefix="cache-") as directory:
            caches = Path(directory)
            plan = caches / "plan.json"
            environment = {
                **ENVIRONMENT,
                "VLLM_CACHE_ROOT": str(caches / "vllm"),
                settings.CACHE: str(caches / "prepared"),
                settings.PLAN_FILE: str(plan),
                **dict(self.variables),
            }
            figures = self._served(log, environment, vocabulary, tokens)
            if self.ours:
                figures["weights"] = preparation(plan)
            if not restart:
                return figures
            started = time.perf_counter()
            with (
                watched_children() as peak,
                serving(self.model, NAME, log, environment, self._options()),
            ):
                figures["start_again_s"] = time.perf_counter() - started
            figures["start_again_peak_bytes"] = peak.bytes
            if self.ours:
                found = figures["weights_again"] = preparation(plan)
                if found["from_cache"] != found["layers"]:
                    raise RuntimeError(f"not all weights came from the cache, see {log}: {found}")
        return figures

    def worker(self, module: str, log: Path, *arguments: str) -> dict[str, Any]:
        """What a module of this package answers that runs vLLM in its own process, and the peak of
        its memory. What vLLM compiles is kept for the next time."""
        command = [sys.executable, "-m", f"benchmarks.serving.{module}", str(self.model)]
        variables = {
            **ENVIRONMENT,
            settings.PLAN_FILE: str(_plan_beside(log)),
            "OMP_NUM_THREADS": "1",
            "VLLM_CACHE_ROOT": str(log.parent / "compiled"),
            **dict(self.variables),
        }
        with log.open("w") as errors, watched_children() as peak:
            result = subprocess.run(
                [*command, *arguments, self.quantization],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        if result.returncode:
            reason = last_error(log.read_text(errors="replace")) or f"see {log}"
            raise RuntimeError(f"{self.name} ended with {result.returncode}: {reason}")
        return {**json.loads(result.stdout), "peak_anonymous_bytes": peak.bytes}

    @property
    def ours(self) -> bool:
        """Whether vLLM has this package."""
        return (settings.ENABLE, "0") not in self.variables

    def _options(self) -> list[str]:
        options = ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(max(STREAMS))]
        options += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        if self.quantization:
            options += ["--quantization", self.quantization]
        return options

    def _served(
        self, log: Path, environment: dict[str, str], vocabulary: int, tokens: int
    ) -> dict[str, Any]:
        started = time.perf_counter()
        with (
            watched_children() as peak,
            serving(self.model, NAME, log, environment, self._options()) as url,
        ):
            start = time.perf_counter() - started
            figures = measure(Client(url, NAME).answer, vocabulary, tokens)
        return {"start_s": start, **figures, "peak_anonymous_bytes": peak.bytes}
