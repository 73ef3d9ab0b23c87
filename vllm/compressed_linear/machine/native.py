# SPDX-License-Identifier: Apache-2.0
"""The compiled library: loading, shape functions for the compiler, call counters.

Ops are reached as ``torch.ops.compressed_linear.<name>`` after ``load()``;
``csrc/ops/ops.cpp`` says what each computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

LIBRARY = Path(__file__).parents[1] / "lib" / "libcompressed_linear.so"
CUDA_LIBRARY = LIBRARY.with_name("libcompressed_linear_cuda.so")
"""CUDA kernels of some of the ops; built if torch has CUDA and nvcc is installed."""
TILE = 16
"""Output channels that are packed together."""
MARLIN_WORKSPACE = 1024
"""Counters that ``marlin_gemm`` needs."""
PROBLEM_BYTES = 152
"""Length of the tensor that ``make_problem`` returns."""

Kernels = Literal["floats", "integers"]
"""Kinds of CPU kernels, each with its own instruction sets: layout "planes" with x in its own
dtype, and layout "quads" with x in int8."""

_lock = threading.Lock()
_reason: str | None = "not loaded yet"
_cuda_reason: str | None = "not loaded yet"


def load() -> None:
    """Load the library and register the shape functions. Idempotent.

    Raises ``RuntimeError`` if it was not built or does not fit the installed torch.
    """
    global _reason, _cuda_reason
    if _reason is None:
        return
    with _lock:
        if _reason is None:
            return
        if not LIBRARY.is_file():
            _reason = f"native library not built ({LIBRARY.name} is not in {LIBRARY.parent})"
            raise RuntimeError(_reason)
        try:
            torch.ops.load_library(str(LIBRARY))
        except OSError as error:
            _reason = f"native library cannot be loaded with torch {torch.__version__}: {error}"
            raise RuntimeError(_reason) from error
        _register_fakes()
        _cuda_reason = _load_cuda()
        _reason = None


def _load_cuda() -> str | None:
    """Load the CUDA kernels; returns None, or why there are none. Touches no GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not CUDA_LIBRARY.is_file():
        return f"CUDA kernels not built ({CUDA_LIBRARY.name} is not in {CUDA_LIBRARY.parent})"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return f"CUDA kernels cannot be loaded with torch {torch.__version__}: {error}"
    return None


def available() -> str | None:
    """None if the ops can be called, else the reason. Loads the library if necessary."""
    try:
        load()
    except RuntimeError as error:
        return str(error)
    return None


def cuda_available() -> str | None:
    """None if the CUDA kernels are loaded, else the reason; does not ask for a GPU. Loads the
    libraries if necessary."""
    reason = available()
    return _cuda_reason if reason is None else reason


def isa(kernels: Kernels = "floats") -> str:
    """Instruction set that is forced, or else the one that repacks and that multiplies where no
    path was selected; ``csrc/cpu/common/isa.cpp`` has their names."""
    load()
    return str(torch.ops.compressed_linear.isa(kernels))


def supported_isas(kernels: Kernels = "floats") -> list[str]:
    """Instruction sets this processor can run, best first."""
    load()
    return str(torch.ops.compressed_linear.supported_isas(kernels)).split()


def select_paths(lines: str) -> None:
    """Which instruction set multiplies how many tokens, in this process: the lines of
    ``csrc/cpu/common/paths.h``. ``ValueError`` for what this processor cannot run."""
    load()
    torch.ops.compressed_linear.select_paths(lines)


def paths() -> str:
    """What is selected, as such lines, one for each class of calls."""
    load()
    return str(torch.ops.compressed_linear.paths())


def layout_id(layout: Literal["planes", "quads"] = "planes") -> str:
    """Name and version of a packed layout and its other tensors; part of the key of stored packed
    weights."""
    load()
    return str(torch.ops.compressed_linear.layout_id(layout))


def call_counts() -> dict[str, int]:
    """Calls since the start or the last reset, for example
    ``{"linear/planes/avx512bf16/uint4": 12}``."""
    load()
    lines = str(torch.ops.compressed_linear.op_call_lines()).splitlines()
    return {name: int(count) for name, count in (line.split() for line in lines)}


def reset_call_counts() -> None:
    """Set every counter to zero."""
    load()
    torch.ops.compressed_linear.reset_op_calls()


Arguments = Mapping[str, Any]

_ROW_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_RESULTS: dict[str, Callable[[Arguments], torch.Tensor]] = {
    "unpack_rows": lambda a: a["packed"].new_empty(
        (a["n"], a["k"]), dtype=_ROW_DTYPES.get(a["element"], torch.uint8)
    ),
    "marlin_scales": lambda a: a["scale"].new_empty(a["scale"].shape[::-1]),
    "marlin_zeros": lambda a: a["zero"].new_empty(
        (a["zero"].shape[1], a["zero"].shape[0] * a["bits"] // 32), dtype=torch.int32
    ),
    "linear": lambda a: a["x"].new_empty((a["x"].shape[0], a["n"]), dtype=a["out_dtype"]),
    "embedding": lambda a: a["problem"].new_empty(
        (a["ids"].shape[0], a["channels"]), dtype=a["out_dtype"]
    ),
    "marlin_gemm": lambda a: a["x"].new_empty((a["x"].shape[0], a["n"]), dtype=a["out_dtype"]),
}
"""Shapes of the results of ops in compiled graphs, from their arguments by name. ``code_sums`` and
``make_problem`` run at preparation only."""


def _register_fakes() -> None:
    for name, result in _RESULTS.items():
        schema = getattr(torch.ops.compressed_linear, name).default._schema
        names = [argument.name for argument in schema.arguments]
        torch.library.register_fake(f"compressed_linear::{name}", _fake(names, result))


def _fake(
    names: list[str], result: Callable[[Arguments], torch.Tensor]
) -> Callable[..., torch.Tensor]:
    def fake(*values: Any, **named: Any) -> torch.Tensor:
        return result(dict(zip(names, values, strict=False)) | named)

    return fake
