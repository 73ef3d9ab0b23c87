# SPDX-License-Identifier: Apache-2.0
"""Measures llama.cpp on one GGUF file."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environments
from benchmarks.machine import ROOT
from benchmarks.serving.memory import watched_children


@dataclass(frozen=True)
class LlamaEngine:
    """``model``: a GGUF file."""

    name: str
    model: Path
    threads: int = 1

    def run(self, log: Path, vocabulary: int, *, restart: bool, tokens: int) -> dict[str, Any]:
        """As ``VllmEngine.run``; the vocabulary is the file's own, and no start leaves caches."""
        return self._worker(log, tokens)

    def step_ms(self, log: Path, streams: int, tokens: int) -> float:
        """Milliseconds of a decode step of so many streams."""
        return float(self._worker(log, tokens, streams)["step_ms"])

    def _worker(self, log: Path, *arguments: int) -> dict[str, Any]:
        command = [str(environments.llama_cpp()), "-m", "benchmarks.serving.llama_worker"]
        command += [str(self.model), str(self.threads), *map(str, arguments)]
        with log.open("w") as errors, watched_children() as peak:
            result = subprocess.run(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        if result.returncode:
            lines = log.read_text(errors="replace").splitlines()
            raise RuntimeError(f"llama.cpp ended with {result.returncode}: {lines[-1:]}")
        figures: dict[str, Any] = json.loads(result.stdout)
        return {**figures, "peak_anonymous_bytes": peak.bytes}
