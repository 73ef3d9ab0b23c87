# SPDX-License-Identifier: Apache-2.0
"""The models that are served, and which engines serve each; made when they are first needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from benchmarks import checkpoint
from benchmarks.machine import BUILD
from benchmarks.serving.llama_engine import LlamaEngine
from benchmarks.serving.llama_file import write_llama
from benchmarks.serving.vllm_engine import VllmEngine

MODELS = BUILD / "models"
STOCK = (("VLLM_COMPRESSED_LINEAR", "0"),)


class Engine(Protocol):
    """What serves a model: ``run`` gives its figures, or raises RuntimeError."""

    @property
    def name(self) -> str: ...
    def run(self, log: Path, vocabulary: int, restart: bool) -> dict[str, object]: ...


@dataclass(frozen=True)
class Model:
    """``engines`` makes what they serve first, which may take minutes."""

    title: str
    vocabulary: int
    engines: Callable[[], dict[str, Engine]]


def _once(target: Path, write: Callable[[Path], None]) -> Path:
    """``target``, made by ``write`` unless it is there; what a broken run left is never taken."""
    if not target.exists():
        partial = target.with_name(target.name + ".partial")
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.rename(target)
    return target


def _vllm(plain: Path, quantized: Path) -> dict[str, Engine]:
    """Ours and stock vLLM, on the quantized checkpoint and on the plain one."""
    return {
        "ours": VllmEngine("vLLM with this package, 4-bit", quantized),
        "vllm": VllmEngine("vLLM, 4-bit", quantized, STOCK),
        "ours-bf16": VllmEngine(
            "vLLM with this package, bf16", plain, quantization="compressed_linear"
        ),
        "vllm-bf16": VllmEngine("vLLM, bf16", plain, STOCK),
    }


def _gemma() -> dict[str, Engine]:
    from demo import WORK
    from demo import checkpoint as gemma_checkpoint

    os.environ.setdefault("TQDM_DISABLE", "1")
    quantized = gemma_checkpoint(Console(stderr=True))
    file = WORK / "gemma-3-270m-q4_k_m.gguf"
    return {
        **_vllm(WORK / "gemma-3-270m-bf16", quantized),
        "llama": LlamaEngine("llama.cpp, Q4_K_M", file),
    }


def _synthetic(name: str, *, plain: bool = True) -> Callable[[], dict[str, Engine]]:
    def made(form: str) -> Path:
        def write(directory: Path) -> None:
            checkpoint.write(checkpoint.SHAPES[name], checkpoint.FORMATS[form], directory)

        return _once(MODELS / f"{name}-{form}", write)

    def engines() -> dict[str, Engine]:
        quantized = made("w4a16")
        found = _vllm(made("bf16") if plain else quantized, quantized)
        if not plain:
            found = {key: engine for key, engine in found.items() if "bf16" not in key}
        for form in ("gptq", "awq", "w8a8", "fp8"):
            model = made(form)
            found[f"ours-{form}"] = VllmEngine(f"vLLM with this package, {form}", model)
            found[f"vllm-{form}"] = VllmEngine(f"vLLM, {form}", model, STOCK)

        def write(file: Path) -> None:
            write_llama(checkpoint.SHAPES[name], file)

        file = _once(MODELS / f"{name}-q4_0.gguf", write)
        found["llama"] = LlamaEngine("llama.cpp, Q4_0 with Q8_0 head", file)
        return found

    return engines


ALL = {
    "gemma-3-270m": Model("Gemma 3 270M", 262144, _gemma),
    "llama-3.2-1b": Model("Llama 3.2 1B, synthetic weights", 128256, _synthetic("llama-3.2-1b")),
    "llama-3-8b": Model(
        "Llama 3 8B, synthetic weights", 128256, _synthetic("llama-3-8b", plain=False)
    ),
}
