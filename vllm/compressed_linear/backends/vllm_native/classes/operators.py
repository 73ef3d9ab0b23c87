# SPDX-License-Identifier: Apache-2.0
"""Which operators the libraries of this vLLM have."""

from __future__ import annotations

import mmap
import platform as _host
from functools import cache
from pathlib import Path

import torch

from vllm.compressed_linear.backends.vllm_native.classes.process import is_here
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.machine.this_cpu import cpu_features


def missing_op(op: str, platform: Platform) -> str | None:
    """Why the operator ``namespace::name`` cannot be called on ``platform``, or None.

    On the device of this process the loaded libraries are asked; for another the platform knows.
    """
    if op in platform.ops:
        return None
    if platform.device == "cpu":
        return _missing_on_cpu(op, platform)
    if not is_here(platform):
        return platform.why_missing(op)
    from vllm import _custom_ops  # noqa: F401  # it loads the library of this machine

    namespace, _, name = op.partition("::")
    if hasattr(getattr(torch.ops, namespace), name):
        return None
    return f"vLLM's library here has no operator {op}"


def _missing_on_cpu(op: str, platform: Platform) -> str | None:
    """The same for ``_C::name`` on a CPU.

    vLLM ships one library for each tier of x86 instruction sets and they do not hold the same
    operators. The one this process loads is asked; the others are searched for the name.
    """
    if op in dict(platform.missing):
        return platform.why_missing(op)
    if platform.machine != _host.machine():
        return f"the vLLM installed here is for {_host.machine()}, not {platform.machine}"
    import vllm
    from vllm import _custom_ops  # noqa: F401  # it loads the library of this machine

    name = op.partition("::")[2]
    library = _library(platform.machine, platform.features)
    if library == _library(_host.machine(), cpu_features()):
        present = hasattr(torch.ops._C, name)
    else:
        path = Path(str(vllm.__file__)).parent / f"{library}.abi3.so"
        present = path.is_file() and _mentions(path, f"{name}(".encode())
    if present:
        return None
    return f"{library}, the library vLLM loads on {platform.name}, has no operator {name}"


def _library(machine: str, features: frozenset[str]) -> str:
    if machine not in ("x86_64", "AMD64") or "avx512_bf16" in features:
        return "_C"
    return "_C_AVX512" if "avx512" in features else "_C_AVX2"


@cache
def _mentions(path: Path, text: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(text) >= 0
