# SPDX-License-Identifier: Apache-2.0
"""The models that are served, and which engines serve each; made when they are first needed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console

from benchmarks import checkpoint
from benchmarks.machine import BUILD
from benchmarks.remote import X_AS_IT_IS
from benchmarks.serving.gemma_schemes import SCHEMES, quantize
from benchmarks.serving.llama_engine import LlamaEngine
from benchmarks.serving.llama_file import write_llama
from benchmarks.serving.vllm_engine import VllmEngine
from vllm.compressed_linear import settings

MODELS = BUILD / "models"
Variables = tuple[tuple[str, str], ...]
BY_DEFAULT: Variables = ((settings.ENABLE, "0"),)
STOCK: Variables = (*BY_DEFAULT, *X_AS_IT_IS)
FORMS = {
    "gptq": "GPTQ 4-bit",
    "awq": "AWQ 4-bit",
    "w4a16": "compressed-tensors 4-bit",
    "w8a8": "compressed-tensors W8A8 int8",
    "fp8": "compressed-tensors W8A8 fp8",
}
"""What the synthetic checkpoints come in, by the names of ``benchmarks.checkpoint``."""
FAST: Variables = ((settings.BACKEND, "*_proj=cpu_int8_fast"),)
"""Activations of 4-bit layers in 8 bits, as llama.cpp has them; the head's stay as they are."""


class Engine(Protocol):
    """What serves a model: ``run`` gives its figures, or raises RuntimeError."""

    @property
    def name(self) -> str: ...
    def run(
        self, log: Path, vocabulary: int, *, restart: bool, tokens: int
    ) -> dict[str, object]: ...


Maker = Callable[[], Engine]
"""Makes what an engine serves, if it is not there yet, which may take minutes."""


@dataclass(frozen=True)
class Model:
    """``engines``: makers by the name that the command line takes."""

    title: str
    vocabulary: int
    engines: Mapping[str, Maker]


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


def _ours(what: str, model: Callable[[], Path], variables: Variables = ()) -> Maker:
    return lambda: VllmEngine(f"vLLM with this package, {what}", model(), variables)


def _stock(what: str, model: Callable[[], Path], variables: Variables = STOCK) -> Maker:
    return lambda: VllmEngine(f"vLLM, {what}", model(), variables)


def _ours_plain(model: Callable[[], Path]) -> Maker:
    return lambda: VllmEngine(
        "vLLM with this package, bf16", model(), quantization="compressed_linear"
    )


def _alone(engines: Mapping[str, Maker], *keys: str) -> dict[str, Maker]:
    """The same without a server."""

    def maker(make: Maker) -> Maker:
        def alone() -> Engine:
            engine = make()
            assert isinstance(engine, VllmEngine)
            return replace(engine, name=f"{engine.name}, no server", server=False)

        return alone

    return {f"{key}-alone": maker(engines[key]) for key in keys}


ALONE = ("ours-head8", "ours-head8-fast", "vllm", "vllm-default", "vllm-bf16")


def _gemma_quantized(head_bits: int) -> Path:
    from demo import checkpoint as gemma_checkpoint

    os.environ.setdefault("TQDM_DISABLE", "1")
    return gemma_checkpoint(Console(stderr=True), head_bits)


def _gemma_source(name: str) -> Path:
    """A file or directory that the quantized checkpoint was made from."""
    from demo import WORK

    _gemma_quantized(16)
    return WORK / name


def _llama() -> Engine:
    return LlamaEngine("llama.cpp, Q4_K_M", _gemma_source("gemma-3-270m-q4_k_m.gguf"))


def _gemma() -> dict[str, Maker]:
    def head8() -> Path:
        return _gemma_quantized(8)

    def head16() -> Path:
        return _gemma_quantized(16)

    def plain() -> Path:
        return _gemma_source("gemma-3-270m-bf16")

    engines = {
        "ours-head8": _ours("4-bit, 8-bit head", head8),
        "ours-head8-fast": _ours("4-bit fast, 8-bit head", head8, FAST),
        "vllm-head8": _stock("4-bit, 8-bit head", head8),
        "ours": _ours("4-bit", head16),
        "vllm": _stock("4-bit", head16),
        "vllm-default": _stock("4-bit, x in 8 bits where that is its default", head16, BY_DEFAULT),
        "ours-bf16": _ours_plain(plain),
        "vllm-bf16": _stock("bf16", plain),
        "llama": _llama,
    }
    return engines | _alone(engines, *ALONE)


def _gemma_schemes() -> dict[str, Maker]:
    """Each scheme with this package and without."""

    def made(scheme: str) -> Callable[[], Path]:
        def write(directory: Path) -> None:
            quantize(_gemma_source("gemma-3-270m-bf16"), directory, scheme)

        return lambda: _once(MODELS / f"gemma-3-270m-{scheme}", write)

    engines = {}
    for scheme in SCHEMES:
        engines[f"ours-{scheme}"] = _ours(scheme, made(scheme))
        engines[f"vllm-{scheme}"] = _stock(scheme, made(scheme))
    alone = _alone(engines, *engines)
    return {**engines, **alone, "llama": _llama}


def _synthetic(name: str) -> dict[str, Maker]:
    shape = checkpoint.SHAPES[name]

    def made(form: str) -> Callable[[], Path]:
        def write(directory: Path) -> None:
            checkpoint.write(shape, checkpoint.FORMATS[form], directory)

        return lambda: _once(MODELS / f"{name}-{form}", write)

    def gguf() -> Path:
        return _once(MODELS / f"{name}-q4_0.gguf", lambda file: write_llama(shape, file))

    engines = {
        **{f"ours-{form}": _ours(title, made(form)) for form, title in FORMS.items()},
        **{f"vllm-{form}": _stock(title, made(form)) for form, title in FORMS.items()},
        "ours-bf16": _ours_plain(made("bf16")),
        "vllm-bf16": _stock("bf16", made("bf16")),
        "llama": lambda: LlamaEngine("llama.cpp, Q4_0 with Q8_0 head", gguf()),
    }
    return engines | _alone(engines, "ours-gptq", "vllm-gptq", "vllm-bf16")


ALL = {
    "gemma-3-270m": Model("Gemma 3 270M", 262144, _gemma()),
    "gemma-3-270m-schemes": Model(
        "Gemma 3 270M in the schemes that servers use", 262144, _gemma_schemes()
    ),
    "llama-3.2-1b": Model("Llama 3.2 1B, synthetic weights", 128256, _synthetic("llama-3.2-1b")),
    "llama-3-8b": Model("Llama 3 8B, synthetic weights", 128256, _synthetic("llama-3-8b")),
}
