# SPDX-License-Identifier: Apache-2.0
"""How codes lie in memory, as values that can be compared, printed and hashed.

``Packing`` describes how b-bit codes share containers along one axis. ``StoredTensor`` describes
one tensor of a checkpoint: its role, the order of its logical axes, and its packing.
``StandardWeights`` is the one layout every backend can ask for.

Logical axes: ``"N"`` output channels, ``"K"`` input channels, ``"G"`` groups along K, ``"B"``
blocks of output channels that share scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import torch

from vllm.compressed_linear import interleave
from vllm.compressed_linear.numerics import torch_dtype

Extents = Mapping[str, int]
"""Length of each logical axis, e.g. ``{"N": 4096, "K": 4096, "G": 32}``."""


class Role(StrEnum):
    """What a checkpoint tensor is for."""

    CODES = "codes"
    SCALE = "scale"
    ZERO = "zero"
    GROUP_INDEX = "group_index"
    SHAPE = "shape"
    ROW_SCALE = "row_scale"
    """Second-level scale of the weight: one number, or one for each output channel."""
    INPUT_SCALE = "input_scale"
    """Static scale of x, one number."""
    INPUT_ZERO = "input_zero"
    """Static zero point of x, one number."""
    PRESCALE = "prescale"
    """What x is multiplied with, one number for each input channel."""


class ZeroBump(StrEnum):
    """GPTQ v1 stores each zero point less one; how the one is given back (FORMATS: GPTQ).

    ``WORD``: the packer subtracted 1 from every field of the whole 32-bit word at once, so a zero
    point of 0 borrowed from its neighbour; the same constant is added to the whole word.
    ``FIELD``: each field wrapped by itself.
    """

    NONE = ""
    WORD = "word"
    FIELD = "field"


@dataclass(frozen=True)
class Packing:
    """How codes of ``bits`` bits share containers along one logical axis.

    * ``dense``: codes form one little-endian bit stream and may straddle containers; otherwise
      each container holds ``container_bits // bits`` codes and its upper bits are unused.
    * ``order``: slot i of a container holds element ``order[i]`` of the container's run (AWQ:
      0 2 4 6 1 3 5 7). Empty means in order.
    * ``planes``: bit planes, low bits first, e.g. (2, 1) for 3 bits; a run of ``container_bits``
      codes takes ``bits`` containers, the containers of the low plane first (GPTQModel gptq_p).
    * ``signed``: codes are two's complement; they are returned with 2^(bits−1) added.
    * ``zero_bump``: see ``ZeroBump``.
    """

    bits: int
    axis: str = "K"
    container: str = "int32"
    dense: bool = True
    order: tuple[int, ...] = ()
    planes: tuple[int, ...] = ()
    signed: bool = False
    zero_bump: ZeroBump = ZeroBump.NONE

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"packing of {self.bits}-bit codes (supported: 1..8)")
        if self.container not in ("int8", "uint8", "int16", "int32", "int64"):
            raise ValueError(
                f"container {self.container} (supported: int8 uint8 int16 int32 int64)"
            )
        if self.container_bits < self.bits:
            raise ValueError(f"{self.bits}-bit codes do not fit a {self.container} container")
        if self.planes and sum(self.planes) != self.bits:
            raise ValueError(f"bit planes {self.planes} do not add up to {self.bits} bits")
        if self.order and (
            sorted(self.order) != list(range(self.run)) or self.run_words != 1 or self.planes
        ):
            raise ValueError(f"order {self.order} is no permutation of one container of {self.run}")

    @property
    def container_bits(self) -> int:
        return torch_dtype(self.container).itemsize * 8

    @property
    def run(self) -> int:
        """Codes in the smallest block of whole containers."""
        if self.planes:
            return self.container_bits
        if not self.dense:
            return self.container_bits // self.bits
        return math.lcm(self.container_bits, self.bits) // self.bits

    @property
    def run_words(self) -> int:
        """Containers in that block."""
        if self.planes:
            return self.bits
        return math.lcm(self.container_bits, self.bits) // self.container_bits if self.dense else 1

    @property
    def pack_factor(self) -> Fraction:
        """Codes per container."""
        return Fraction(self.run, self.run_words)

    def words(self, length: int) -> int:
        """Containers that hold ``length`` codes."""
        if self.planes or not self.dense:
            return -(-length // self.run) * self.run_words
        return -(-length * self.bits // self.container_bits)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each plane, low bits first; without planes the code is one."""
        return self.planes or (self.bits,)

    def bit_positions(self, start: int, length: int) -> torch.Tensor:
        """int64 [planes, length]: first bit of the fields of elements [start, start + length) in
        the stream of containers, counted from the lowest bit of the first one."""
        element = torch.arange(start, start + length)
        block = element // self.run * (self.run_words * self.container_bits)
        slot = element % self.run
        if self.order:
            slot = torch.tensor(self.order).argsort()[slot]
        below, rows = 0, []
        for width in self.widths:
            # The containers of a plane begin after those of the planes below it.
            rows.append(block + below * self.container_bits * bool(self.planes) + slot * width)
            below += width
        return torch.stack(rows)

    def __str__(self) -> str:
        parts = [f"{self.bits}-bit in {self.container} along {self.axis}"]
        if self.planes:
            parts.append("planes " + "+".join(map(str, self.planes)))
        elif not self.dense:
            parts.append("not straddling")
        if self.order:
            parts.append("order " + "".join(map(str, self.order)))
        return ", ".join(parts)


def _as_unsigned64(words: torch.Tensor) -> torch.Tensor:
    """Containers → int64 with the container's bits, zero extended (int64 stays as it is)."""
    if words.dtype == torch.int64:
        return words
    bits = words.element_size() * 8
    return words.to(torch.int64) & ((1 << bits) - 1)


def unpack(stored: torch.Tensor, packing: Packing, length: int, dim: int = -1) -> torch.Tensor:
    """Unpack codes along dimension ``dim``.

    stored: [..., words, ...] of the packing's container dtype, at least ``packing.words(length)``
    long. Returns uint8 of the same rank, ``length`` long along ``dim``. Raises ``ValueError`` on
    another dtype or too few containers.
    """
    if stored.dtype != torch_dtype(packing.container):
        raise ValueError(f"codes are {stored.dtype}, expected {packing.container}")
    words = stored.movedim(dim, -1)
    needed = packing.words(length)
    if words.shape[-1] < needed:
        raise ValueError(f"{words.shape[-1]} containers hold fewer than {length} codes ({packing})")
    words = words[..., :needed]
    if packing.zero_bump is ZeroBump.WORD:
        words = words + _field_ones(packing)
    blocks = -(-length // packing.run)
    pad = blocks * packing.run_words - needed
    if pad:
        words = torch.nn.functional.pad(words, (0, pad))
    if packing.planes:
        codes = _unpack_planes(words, packing)
    elif 8 % packing.bits == 0:
        codes = _unpack_bytes(words, packing)
    else:
        codes = _unpack_stream(words, packing)
    if packing.order:
        inverse = torch.tensor(packing.order).argsort().to(codes.device)
        codes = codes.unflatten(-1, (-1, packing.run)).index_select(-1, inverse).flatten(-2)
    codes = codes[..., :length]
    mask = (1 << packing.bits) - 1
    if packing.signed:
        codes = codes ^ (1 << (packing.bits - 1))
    if packing.zero_bump is ZeroBump.FIELD:
        codes = (codes + 1) & mask
    return codes.movedim(-1, dim)


def _field_ones(packing: Packing) -> int:
    """1 in every field of one container, as a Python int that fits the signed container."""
    bits = packing.container_bits
    ones = sum(1 << shift for shift in range(0, bits - packing.bits + 1, packing.bits))
    return ones - (1 << bits) if ones >= 1 << (bits - 1) else ones


def _reread(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same memory as ``dtype``. ``contiguous`` alone is not enough for that: it leaves a last
    dimension of length 1 any stride."""
    if tensor.stride(-1) != 1 or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(dtype)


def _unpack_bytes(words: torch.Tensor, packing: Packing) -> torch.Tensor:
    """1, 2, 4 and 8 bits never straddle a byte, so the containers are read as bytes."""
    raw = _reread(words, torch.uint8)
    if packing.bits == 8:
        return raw
    mask = (1 << packing.bits) - 1
    per_byte = 8 // packing.bits
    codes = torch.empty(*raw.shape, per_byte, dtype=torch.uint8, device=raw.device)
    for slot in range(per_byte):
        codes[..., slot] = (raw >> (slot * packing.bits)) & mask
    return codes.flatten(-2)


def _unpack_stream(words: torch.Tensor, packing: Packing) -> torch.Tensor:
    bits, container = packing.bits, packing.container_bits
    blocks = _as_unsigned64(words).unflatten(-1, (-1, packing.run_words))
    out = torch.empty(*blocks.shape[:-1], packing.run, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for slot in range(packing.run):
        word, shift = divmod(slot * bits, container)
        code = blocks[..., word] >> shift
        if shift + bits > container:
            # int64 words shift arithmetically: clear what the sign bit smeared in.
            code = code & ((1 << (container - shift)) - 1)
            code = code | (blocks[..., word + 1] << (container - shift))
        out[..., slot] = (code & mask).to(torch.uint8)
    return out.flatten(-2)


def _unpack_planes(words: torch.Tensor, packing: Packing) -> torch.Tensor:
    blocks = words.unflatten(-1, (-1, packing.run_words))
    codes = torch.zeros(*blocks.shape[:-1], packing.run, dtype=torch.uint8, device=words.device)
    word = below = 0
    for width in packing.planes:
        plane = Packing(width, packing.axis, packing.container)
        part = blocks[..., word : word + width]
        fields = _unpack_bytes(part, plane) if 8 % width == 0 else _unpack_stream(part, plane)
        codes |= fields << below
        word += width
        below += width
    return codes.flatten(-2)


def pack(codes: torch.Tensor, packing: Packing, dim: int = -1) -> torch.Tensor:
    """The inverse of ``unpack``: uint8 codes [..., length, ...] → containers [..., words, ...]."""
    codes = codes.movedim(dim, -1)
    length = codes.shape[-1]
    mask = (1 << packing.bits) - 1
    if packing.zero_bump is ZeroBump.FIELD:
        codes = (codes - 1) & mask
    if packing.signed:
        codes = codes ^ (1 << (packing.bits - 1))
    codes = torch.nn.functional.pad(codes, (0, -length % packing.run))
    if packing.order:
        order = torch.tensor(packing.order, device=codes.device)
        codes = codes.unflatten(-1, (-1, packing.run)).index_select(-1, order).flatten(-2)
    in_bytes = 8 % packing.bits == 0 and not packing.planes
    words = (_pack_bytes if in_bytes else _pack_stream)(codes, packing)
    stored = words[..., : packing.words(length)]
    if packing.zero_bump is ZeroBump.WORD:
        stored = stored - _field_ones(packing)
    return stored.movedim(-1, dim).contiguous()


def _pack_bytes(codes: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The inverse of ``_unpack_bytes``."""
    mask = (1 << packing.bits) - 1
    per_byte = 8 // packing.bits
    raw = codes[..., ::per_byte] & mask
    for slot in range(1, per_byte):
        raw = raw | (codes[..., slot::per_byte] & mask) << (slot * packing.bits)
    # A dimension for the container's bytes, since an empty tensor cannot be reread without one.
    raw = raw.unflatten(-1, (-1, packing.container_bits // 8))
    return _reread(raw, torch_dtype(packing.container)).squeeze(-1)


def _pack_stream(codes: torch.Tensor, packing: Packing) -> torch.Tensor:
    blocks = codes.unflatten(-1, (-1, packing.run)).to(torch.int64)
    words = torch.zeros(
        *blocks.shape[:-1], packing.run_words, dtype=torch.int64, device=codes.device
    )
    for bits, word0, below in _planes_of(packing):
        for slot in range(packing.run):
            word, shift = divmod(slot * bits, packing.container_bits)
            field = (blocks[..., slot] >> below) & ((1 << bits) - 1)
            words[..., word0 + word] |= field << shift
            if shift + bits > packing.container_bits:
                words[..., word0 + word + 1] |= field >> (packing.container_bits - shift)
    return words.flatten(-2).to(torch_dtype(packing.container))


def _planes_of(packing: Packing) -> list[tuple[int, int, int]]:
    """(field width, first word of the plane, bits below the plane) of each bit plane."""
    if not packing.planes:
        return [(packing.bits, 0, 0)]
    out, below = [], 0
    for width in packing.planes:
        out.append((width, below, below))
        below += width
    return out


@dataclass(frozen=True)
class AxisSlice:
    """Where elements [start, start + length) of a logical axis lie in a stored dimension.

    Stored positions [first, first + count) cover them; the first ``skip`` unpacked elements are
    not wanted (a packed run that another rank's or shard's part begins in).
    """

    first: int
    count: int
    skip: int
    length: int


def slice_axis(packing: Packing | None, axis: str, start: int, length: int) -> AxisSlice:
    """The stored positions of elements [start, start+length) of ``axis``, outward to whole runs."""
    if packing is None or packing.axis != axis:
        return AxisSlice(start, length, 0, length)
    block = start // packing.run
    first = block * packing.run_words
    skip = start - block * packing.run
    return AxisSlice(first, packing.words(skip + length), skip, length)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight as the checkpoint holds it.

    ``name``: last part of its name on disk (``"qweight"``). ``axes``: the logical axis of each
    stored dimension; an int is a fixed length. ``variants``: other packings under the same name,
    told apart by the stored shape. ``dtype`` is the container for packed tensors; for scales and
    float zero points it is the widest dtype that is accepted. ``group_multiple``: the G axis is
    stored rounded up to a multiple of this (AWQ gemv). ``interleave``: name of a permutation of the
    whole matrix, see ``interleave.py``; its shape on disk is then its own. ``reciprocal``: scales
    are stored as what to divide by (compressed-tensors' NVFP4); they mean 1 / stored, in fp32.
    """

    name: str
    role: Role
    dtype: str
    axes: tuple[str | int, ...]
    packing: Packing | None = None
    variants: tuple[Packing, ...] = ()
    optional: bool = False
    group_multiple: int = 1
    interleave: str = ""
    reciprocal: bool = False

    @property
    def packings(self) -> tuple[Packing | None, ...]:
        return (self.packing, *self.variants)

    def shape(self, extents: Extents, packing: Packing | None = None) -> tuple[int, ...]:
        """Stored shape for logical ``extents`` under ``packing`` (default: the first one)."""
        if self.interleave:
            return interleave.stored_shape(self, extents)
        packing = packing or self.packing
        shape = []
        for axis in self.axes:
            length = axis if isinstance(axis, int) else extents[axis]
            if axis == "G":
                length = -(-length // self.group_multiple) * self.group_multiple
            if packing is not None and axis == packing.axis:
                length = packing.words(length)
            shape.append(length)
        return tuple(shape)

    def packing_of(self, shape: tuple[int, ...], extents: Extents) -> Packing | None:
        """The packing whose shape for ``extents`` is ``shape``; ``ValueError`` if none is."""
        for packing in self.packings:
            if self.shape(extents, packing) == shape:
                return packing
        raise ValueError(
            f"has shape {list(shape)}, expected "
            + " or ".join(str(list(self.shape(extents, p))) for p in dict.fromkeys(self.packings))
        )


@dataclass(frozen=True)
class StandardWeights:
    """Some rows of a weight in standard layout.

    codes: uint8 [n, K], or the float tensor itself for 16- and 32-bit element types.
    scale: [n, G] in the checkpoint's dtype (uint8 for e8m0), or None. zero: [n, G], uint8 for
    integer zero points and float otherwise, or None. Group of channel k is ``k // (K / G)``.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
