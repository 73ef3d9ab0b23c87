# SPDX-License-Identifier: Apache-2.0
"""Repack codes, scales and zero points of a checkpoint into the layouts of the CPU kernels."""

from __future__ import annotations

from typing import Literal

import torch

from vllm.compressed_linear.backends.shared.repack import (
    CodeLocation,
    CodeWriter,
    write_codes,
)
from vllm.compressed_linear.backends.shared.side_tensors import put_tiles
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine import arena, native
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor

Layout = Literal["planes", "quads"]
"""Name of a header of ``csrc/layouts``."""


def new_packed(
    descriptor: CompressedLinearDescriptor, element: str, layout: Layout
) -> torch.Tensor:
    """Allocate the packed codes, uint8 [tiles, bytes of a tile]."""
    d = descriptor
    shape = torch.ops.compressed_linear.packed_shape(layout, d.n, d.k, d.group_size, element)
    return arena.empty(shape, torch.uint8)


def pack_codes(
    packed: torch.Tensor,
    weights: CompressedWeights,
    descriptor: CompressedLinearDescriptor,
    element: str,
    layout: Layout,
) -> None:
    """Fill ``packed`` uint8 [tiles, bytes of a tile] with the codes of ``weights``."""
    torch.ops.compressed_linear.place(packed)
    write_codes(_writer(packed, descriptor, element, layout), weights, descriptor, element)


def _writer(
    packed: torch.Tensor,
    descriptor: CompressedLinearDescriptor,
    element: str,
    layout: Layout,
) -> CodeWriter:
    shape = (descriptor.n, descriptor.group_size, element)
    ops = torch.ops.compressed_linear

    def located(at: CodeLocation, rows: int, blank: int, blank_code: int, row_start: int) -> None:
        ops.repack_codes(layout, packed, *at.arguments, rows, blank, blank_code, row_start, *shape)

    def standard(codes: torch.Tensor, row_start: int) -> None:
        ops.pack_rows(layout, packed, codes, row_start, *shape)

    return CodeWriter(located, standard)


def pack_scales(
    tensors: dict[str, torch.Tensor],
    weights: CompressedWeights,
    descriptor: CompressedLinearDescriptor,
) -> None:
    """Fill ``scale`` and ``zero`` [tiles, G, 16], if present.

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
