# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint's codes to the packed layouts of the CPU kernels.

Most packings can be said as the bit at which each code begins, and such codes are repacked where
they lie, in all threads. The others pass through the standard layout, a chunk of rows at a time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from vllm.compressed_linear import native
from vllm.compressed_linear.backends.tiles import put_tiles
from vllm.compressed_linear.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.layout import Packing, ZeroBump
from vllm.compressed_linear.numerics import torch_dtype
from vllm.compressed_linear.weights import CompressedWeights, LoadedShard, StoredCodes

logger = logging.getLogger(__name__)

_WHOLE_BYTES = Packing(8, container="uint8")
"""What codes without a packing are."""

_BYTES = ("uint8", "e4m3", "e5m2")


@dataclass(frozen=True)
class PackedLayout:
    """Names of the ops that fill one of the kernels' layouts."""

    repack_codes: str
    pack_rows: str


PLANES = PackedLayout("repack_codes", "pack_rows")
"""``csrc/cpu/layout.h``"""

QUADS = PackedLayout("repack_codes_int8", "pack_rows_int8")
"""``csrc/cpu/int8_layout.h``"""


@dataclass(frozen=True)
class CodeLocation:
    """Arguments of ``repack_codes`` that say where a shard's codes lie."""

    tensor: torch.Tensor
    order: str
    k_at: torch.Tensor
    n_at: torch.Tensor | None
    widths: tuple[int, ...]
    flip: int
    n_first: int


def pack_codes(
    packed: torch.Tensor,
    weights: CompressedWeights,
    descriptor: CompressedLinearDescriptor,
    element: str,
    layout: PackedLayout = PLANES,
) -> None:
    """Fill ``packed`` uint8 [tiles, bytes of a tile] with the codes of ``weights``."""
    d = descriptor
    ops = torch.ops.compressed_linear
    ops.place(packed)
    if d.weight.element.kind == "dense":
        pack_standard(packed, weights, d, element, layout)
        return
    locations = [locate_codes(shard, weights.permutation, d.k, element) for shard in weights.shards]
    sizes = [shard.source.n + shard.source.padding for shard in weights.shards]
    obstacle = next((found for found in locations if isinstance(found, str)), None)
    if any(size % native.TILE for size in sizes[:-1]):
        obstacle = f"shards of {sizes} output channels (tiles are of {native.TILE})"
    if obstacle is not None:
        logger.debug("%s: prepared through the standard layout: %s", d, obstacle)
        pack_standard(packed, weights, d, element, layout)
        return
    repack_codes = getattr(ops, layout.repack_codes)
    start = 0
    for index, found in enumerate(locations):
        shard = weights.shards[index]
        assert isinstance(found, CodeLocation)
        n, blank = shard.source.n, shard.source.padding
        repack_codes(
            packed,
            found.tensor,
            found.order,
            found.k_at,
            found.n_at,
            found.widths,
            found.flip,
            found.n_first,
            n,
            blank,
            weights.blank_code(index),
            start,
            d.n,
            d.group_size,
            element,
        )
        start += n + blank


def pack_standard(
    packed: torch.Tensor,
    weights: CompressedWeights,
    descriptor: CompressedLinearDescriptor,
    element: str,
    layout: PackedLayout = PLANES,
) -> None:
    """The same through the standard layout; rows of floats it takes where they lie."""
    pack_rows = getattr(torch.ops.compressed_linear, layout.pack_rows)
    for start, stop in weights.chunks(native.TILE):
        codes = weights.rows(start, stop).codes.contiguous()
        pack_rows(packed, codes, start, descriptor.n, descriptor.group_size, element)


def locate_codes(
    shard: LoadedShard, permutation: torch.Tensor | None, k: int, element: str
) -> CodeLocation | str:
    """Where the codes of a shard lie, or what of their layout ``repack_codes`` cannot be told.

    ``permutation``: int32 [k], the stored channel of each of the kernel's, −1 for none.
    """
    codes = shard.stored_codes()
    if (obstacle := _obstacle(codes, element)) is not None:
        return obstacle
    packing = codes.packing or _WHOLE_BYTES
    tensor = codes.tensor if codes.packing else codes.tensor.view(torch.uint8)
    axis = codes.packing.axis if codes.packing else codes.stored.axes[1]
    k_skip, n_skip = codes.skips["K"], codes.skips["N"]
    flip = 1 << (packing.bits - 1) if packing.signed else 0
    stored_k = torch.arange(k) if permutation is None else permutation.cpu().long()
    if axis == "N":
        k_at = torch.where(stored_k < 0, -1, stored_k + k_skip)
        n_at = packing.bit_positions(n_skip, shard.source.n)
        return CodeLocation(tensor, "k_major", _int32(k_at), _int32(n_at), packing.widths, flip, 0)
    bits = packing.bit_positions(k_skip, shard.source.k)
    k_at = torch.where(stored_k < 0, -1, bits[:, stored_k.clamp(min=0)])
    order = "n_major" if codes.stored.axes[0] == "N" else "k_words"
    return CodeLocation(tensor, order, _int32(k_at), None, packing.widths, flip, n_skip)


def _obstacle(codes: StoredCodes, element: str) -> str | None:
    stored, packing, tensor = codes.stored, codes.packing, codes.tensor
    if stored.interleave:
        return f"interleave {stored.interleave}"
    if tensor.dim() != 2 or not tensor.is_contiguous():
        return "codes of other axes or strides"
    if packing is None:
        bytes_ = tensor.dtype in (torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
        return None if bytes_ and element in _BYTES else "codes without a packing"
    if tensor.dtype != torch_dtype(packing.container):
        return f"{tensor.dtype} codes in {packing.container} containers"
    if packing.zero_bump is not ZeroBump.NONE:
        return "codes that count from another zero"
    if packing.axis == "N" and stored.axes[0] == "N":
        return "codes packed along N in columns"
    if packing.container == "int64" and stored.axes[0] == packing.axis:
        return "columns of int64 containers"
    return None


def _int32(positions: torch.Tensor) -> torch.Tensor:
    return positions.to(torch.int32).contiguous()


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
