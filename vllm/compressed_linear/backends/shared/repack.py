# SPDX-License-Identifier: Apache-2.0
"""Bit addresses of codes in a checkpoint tensor, for single-pass repacking.

For most packings the bit address of each code is known; such codes are repacked directly from the
checkpoint tensor, in all threads. All others pass through the standard layout, a chunk of rows at a
time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vllm.compressed_linear.checkpoint.shard import LoadedShard, StoredCodes
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.spec.packing import Packing, ZeroBump

logger = logging.getLogger(__name__)

_WHOLE_BYTES = Packing(8, container="uint8")
"""Packing of codes that are stored one per byte."""

_BYTES = ("uint8", "e4m3", "e5m2")


@dataclass(frozen=True)
class CodeLocation:
    """Arguments of ``repack_codes`` with the bit addresses of a shard's codes."""

    tensor: torch.Tensor
    order: str
    k_at: torch.Tensor
    n_at: torch.Tensor | None
    widths: tuple[int, ...]
    flip: int
    n_first: int

    def to(self, device: torch.device) -> CodeLocation:
        """The same with the codes on ``device``; the addresses stay on the CPU."""
        return replace(self, tensor=self.tensor.to(device))

    @property
    def arguments(self) -> tuple[object, ...]:
        """Arguments in the order of the op."""
        return (
            self.tensor,
            self.order,
            self.k_at,
            self.n_at,
            self.widths,
            self.flip,
            self.n_first,
        )


@dataclass(frozen=True)
class CodeWriter:
    """The two ways to write codes into a packed layout.

    ``located(location, rows, blank, blank_code, row_start)``: output channels as ``repack_codes``
    of ``native`` takes them. ``standard(codes, row_start)``: codes uint8 [rows, K], or rows of
    floats. Both may begin at multiples of ``native.TILE`` only.
    """

    located: Callable[[CodeLocation, int, int, int, int], None]
    standard: Callable[[torch.Tensor, int], None]


def write_codes(
    writer: CodeWriter,
    weights: CompressedWeights,
    descriptor: CompressedLinearDescriptor,
    element: str,
) -> None:
    """Write all codes of ``weights`` by ``writer``, directly from the checkpoint if possible."""
    d = descriptor
    if d.weight.element.kind == "dense":
        write_standard(writer, weights)
        return
    locations = [locate_codes(shard, weights.permutation, d.k, element) for shard in weights.shards]
    sizes = [shard.source.n + shard.source.padding for shard in weights.shards]
    obstacle = next((found for found in locations if isinstance(found, str)), None)
    if any(size % native.TILE for size in sizes[:-1]):
        obstacle = f"shards of {sizes} output channels (tiles are of {native.TILE})"
    if obstacle is not None:
        logger.debug("%s: prepared through the standard layout: %s", d, obstacle)
        write_standard(writer, weights)
        return
    start = 0
    for index, found in enumerate(locations):
        source = weights.shards[index].source
        assert isinstance(found, CodeLocation)
        writer.located(found, source.n, source.padding, weights.blank_code(index), start)
        start += source.n + source.padding


def write_standard(writer: CodeWriter, weights: CompressedWeights) -> None:
    """The same through the standard layout; rows of floats are taken without a copy."""
    for start, stop in weights.chunks(native.TILE):
        writer.standard(weights.rows(start, stop).codes.contiguous(), start)


def locate_codes(
    shard: LoadedShard, permutation: torch.Tensor | None, k: int, element: str
) -> CodeLocation | str:
    """Bit addresses of a shard's codes, or the property that ``repack_codes`` does not support.

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
        return "codes with an offset"
    if packing.axis == "N" and stored.axes[0] == "N":
        return "codes packed along N in columns"
    if packing.container == "int64" and stored.axes[0] == packing.axis:
        return "columns of int64 containers"
    return None


def _int32(positions: torch.Tensor) -> torch.Tensor:
    return positions.to(torch.int32).contiguous()
