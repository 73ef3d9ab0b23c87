# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's codes to the packed layout of the CPU kernels."""

from __future__ import annotations

import torch

from vllm.compressed_linear import native
from vllm.compressed_linear.backends.code_source import (
    CodeLocation,
    CodeWriter,
    write_codes,
    write_standard,
)
from vllm.compressed_linear.backends.tiles import put_tiles
from vllm.compressed_linear.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.weights import CompressedWeights


def pack_codes(
    packed: torch.Tensor,
    weights: CompressedWeights,
    descriptor: CompressedLinearDescriptor,
    element: str,
) -> None:
    """Fill ``packed`` uint8 [tiles, bytes of a tile] with the codes of ``weights``."""
    torch.ops.compressed_linear.place(packed)
    write_codes(_writer(packed, descriptor, element), weights, descriptor, element)


def pack_standard(
    packed: torch.Tensor,
    weights: CompressedWeights,
    descriptor: CompressedLinearDescriptor,
    element: str,
) -> None:
    """The same through the standard layout; rows of floats it takes where they lie."""
    write_standard(_writer(packed, descriptor, element), weights)


def _writer(
    packed: torch.Tensor, descriptor: CompressedLinearDescriptor, element: str
) -> CodeWriter:
    ops, shape = torch.ops.compressed_linear, (descriptor.n, descriptor.group_size, element)

    def located(at: CodeLocation, rows: int, blank: int, blank_code: int, row_start: int) -> None:
        ops.repack_codes(packed, *at.arguments, rows, blank, blank_code, row_start, *shape)

    def standard(codes: torch.Tensor, row_start: int) -> None:
        ops.pack_rows(packed, codes, row_start, *shape)

    return CodeWriter(located, standard)


def pack_scales(
    tensors: dict[str, torch.Tensor],
    weights: CompressedWeights,
    descriptor: CompressedLinearDescriptor,
) -> None:
    """Fill ``scale`` and ``zero`` [tiles, G, 16], those of them that there are.

    Raises ``ValueError`` for a zero point that the target's dtype cannot hold.
    """
    for tensor in tensors.values():
        torch.ops.compressed_linear.place(tensor)
    if not tensors:
        return
    for start, stop in weights.chunks(native.TILE):
        for name, values in zip(("scale", "zero"), weights.scales(start, stop), strict=True):
            if name in tensors and values is not None:
                put_tiles(tensors[name], values, start, f"{name} of {descriptor}")
