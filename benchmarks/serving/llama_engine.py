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

    def run(self, log: Path, vocabulary: int, restart: bool) -> dict[str, Any]:
        """As ``VllmEngine.run``; the vocabulary is the file's own, and no start leaves caches."""
        command = [str(environments.llama_cpp()), "-m", "benchmarks.serving.llama_worker"]
        with log.open("w") as errors, watched_children() as peak:
            result = subprocess.run(
                [*command, str(self.model), str(self.threads)],
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
