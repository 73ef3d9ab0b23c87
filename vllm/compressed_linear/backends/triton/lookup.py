# SPDX-License-Identifier: Apache-2.0
"""The op that looks up rows of an embedding table in the Triton backend's tensors.

Consecutive words of a row are a whole row of words apart (``packing.py``), so each word costs the
memory eight times its size. A step reads a few thousand rows of a table at most.
"""

from __future__ import annotations

import contextlib

import torch

from vllm.compressed_linear.backends.triton.runtime import check_device, check_packed, interpreted
from vllm.compressed_linear.backends.triton.spec import KernelSpec

_OP = "compressed_linear::triton_embedding"
_ROWS, _CHANNELS = 8, 128
"""Of one program."""


@torch.library.custom_op("compressed_linear::triton_embedding", mutates_args=())
def triton_embedding(
    ids: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    perm: torch.Tensor | None,
    table: torch.Tensor | None,
    n: int,
    scale_kind: str,
    spec: str,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """ids [M] → rows of ŵ, [M, channels of x]. An id that is none of the n rows gives NaN. The
    other arguments are those of the op ``triton_linear``."""
    constants = KernelSpec.parse(spec)
    check_device(_OP, "ids", ids)
    check_packed(_OP, packed, ids.device, n, constants)
    shape = (len(ids), constants.channels)
    # Filled up channels have no place in a row, so all of it is written where all are in order.
    make = torch.empty if perm is None else torch.zeros
    out = make(shape, dtype=output_dtype, device=ids.device)
    if not out.numel():
        return out
    from vllm.compressed_linear.backends.triton import lookup_kernel

    grid = (-(-len(ids) // _ROWS), -(-constants.k // _CHANNELS))
    on_device = torch.cuda.device(ids.device) if ids.is_cuda else contextlib.nullcontext()
    with on_device:
        lookup_kernel.lookup_kernel[grid](
            ids.contiguous(),
            packed,
            scale,
            zero,
            row_scale,
            perm,
            table,
            out,
            len(ids),
            n,
            packed.shape[1],
            constants.k,
            constants.k_filled,
            constants.channels,
            constants.segment,
            constants.filled,
            constants.group_size,
            **lookup_constants(constants, scale_kind),
            INTERPRETED=interpreted(),
        )
    return out


@triton_embedding.register_fake
def _(
    ids: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    perm: torch.Tensor | None,
    table: torch.Tensor | None,
    n: int,
    scale_kind: str,
    spec: str,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    channels = KernelSpec.parse(spec).channels
    return packed.new_empty(ids.shape[0], channels, dtype=output_dtype)


def lookup_constants(spec: KernelSpec, scale_kind: str) -> dict[str, int | str | bool]:
    """What ``triton_lookup_kernel.lookup_kernel`` is compiled for."""
    return {
        **spec.decoding,
        "SCALE_KIND": scale_kind,
        "ROWS": _ROWS,
        "BLOCK": _CHANNELS,
    }
