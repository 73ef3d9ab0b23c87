# SPDX-License-Identifier: Apache-2.0
"""Device or interpreter of the Triton kernels, and argument checks of their ops."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from vllm.compressed_linear.backends.triton.packing import columns, packed_rows
from vllm.compressed_linear.backends.triton.spec import KernelSpec

_INTERPRETED = (8, 80)


def missing() -> str | None:
    """None if Triton can be imported, else why not."""
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def gpu(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, compute capability); assumed values in the interpreter."""
    if device.type != "cuda":
        return _INTERPRETED
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, 10 * found.major + found.minor


def check_device(op: str, name: str, tensor: torch.Tensor) -> None:
    """``RuntimeError`` for a tensor off a GPU."""
    if not tensor.is_cuda and not interpreted():
        raise RuntimeError(
            f"{op}: {name} is on {tensor.device}, expected cuda (or TRITON_INTERPRET=1 in the "
            "environment)"
        )


def check_packed(
    op: str, packed: torch.Tensor, device: torch.device, n: int, spec: KernelSpec
) -> None:
    """``ValueError`` for packed weights that would be read out of bounds, or elsewhere."""
    if packed.device != device:
        raise ValueError(f"{op}: packed is on {packed.device}, expected {device}")
    shape = (packed_rows(spec), columns(n))
    if packed.shape != shape or packed.dtype != torch.int32 or not packed.is_contiguous():
        raise ValueError(
            f"{op}: packed is {packed.dtype} of shape {list(packed.shape)}, expected contiguous "
            f"int32 of shape {list(shape)}"
        )
