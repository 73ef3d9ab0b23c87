# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's codes to the packed layouts of the CPU kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm.compressed_linear.backends.shared.repack import (
    CodeLocation,
    CodeWriter,
    write_codes,
)
from vllm.compressed_linear.backends.shared.side_tensors import put_tiles
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor


@dataclass(frozen=True)
class PackedLayout:
    """Names of the ops that fill one of the kernels' layouts."""

    repack_codes: str
    pack_rows: str


PLANES = PackedLayout("repack_codes", "pack_rows")
"""``csrc/layouts/planes.h``"""

QUADS = PackedLayout("repack_codes_int8", "pack_rows_int8")
"""``csrc/layouts/quads.h``"""


def pack_codes(
    packed: torch.Tensor,
    weights: CompressedWeights,
    descriptor: CompressedLinearDescriptor,
    element: str,
    layout: PackedLayout = PLANES,
) -> None:
    """Fill ``packed`` uint8 [tiles, bytes of a tile] with the codes of ``weights``."""
    torch.ops.compressed_linear.place(packed)
    write_codes(_writer(packed, descriptor, element, layout), weights, descriptor, element)


def _writer(
    packed: torch.Tensor,
    descriptor: CompressedLinearDescriptor,
    element: str,
    layout: PackedLayout,
) -> CodeWriter:
    shape = (descriptor.n, descriptor.group_size, element)
    repack_codes = getattr(torch.ops.compressed_linear, layout.repack_codes)
    pack_rows = getattr(torch.ops.compressed_linear, layout.pack_rows)

    def located(at: CodeLocation, rows: int, blank: int, blank_code: int, row_start: int) -> None:
        repack_codes(packed, *at.arguments, rows, blank, blank_code, row_start, *shape)

    def standard(codes: torch.Tensor, row_start: int) -> None:
        pack_rows(packed, codes, row_start, *shape)

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
