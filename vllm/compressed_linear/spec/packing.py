# SPDX-License-Identifier: Apache-2.0
"""Packing of b-bit codes into containers along one axis, as a value, and its inverse.

``scheme.py`` has the tensors that use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import torch

from vllm.compressed_linear.spec.elements import torch_dtype


class ZeroBump(StrEnum):
    """GPTQ v1 stores zero point − 1; how the 1 is added back (FORMATS: GPTQ).

    ``WORD``: the packer subtracted 1 from every field of the whole 32-bit word at once, so a zero
    point of 0 borrowed from the next field; the same constant is added to the whole word.
    ``FIELD``: each field wraps around separately.
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
    * ``single``: not packed, each container holds one code; signed ones are sign extended.
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
    single: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"packing of {self.bits}-bit codes (supported: 1..8)")
        if self.container not in ("int8", "uint8", "int16", "int32", "int64"):
            raise ValueError(
                f"container {self.container} (supported: int8 uint8 int16 int32 int64)"
            )
        if self.container_bits < self.bits:
            raise ValueError(f"{self.bits}-bit codes do not fit a {self.container} container")
        if self.single and (self.planes or self.order or self.zero_bump is not ZeroBump.NONE):
            raise ValueError("codes that are not packed have neither planes, order nor a bump")
        if self.planes and sum(self.planes) != self.bits:
            raise ValueError(f"bit planes {self.planes} do not add up to {self.bits} bits")
        if self.order and (
            sorted(self.order) != list(range(self.run)) or self.run_words != 1 or self.planes
        ):
            raise ValueError(
                f"order {self.order} is not a permutation of one container of {self.run}"
            )

    @property
    def container_bits(self) -> int:
        return torch_dtype(self.container).itemsize * 8

    @property
    def run(self) -> int:
        """Codes in the smallest block of whole containers."""
        if self.single:
            return 1
        if self.planes:
            return self.container_bits
        if not self.dense:
            return self.container_bits // self.bits
        return math.lcm(self.container_bits, self.bits) // self.bits

    @property
    def run_words(self) -> int:
        """Containers in that block."""
        if self.single:
            return 1
        if self.planes:
            return self.bits
        return math.lcm(self.container_bits, self.bits) // self.container_bits if self.dense else 1

    @property
    def pack_factor(self) -> Fraction:
        """Codes per container."""
        return Fraction(self.run, self.run_words)

    def words(self, length: int) -> int:
        """Containers that hold ``length`` codes."""
        if self.single:
            return length
        if self.planes or not self.dense:
            return -(-length // self.run) * self.run_words
        return -(-length * self.bits // self.container_bits)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each plane, low bits first; without planes the whole code is one field."""
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
        elif self.single:
            parts.append("not packed")
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
    elif packing.single:
        codes = (_as_unsigned64(words) & ((1 << packing.bits) - 1)).to(torch.uint8)
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
    """Reinterpret the memory as ``dtype``. ``contiguous`` alone does not suffice: a last dimension
    of length 1 may keep any stride."""
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
            # int64 words shift arithmetically: clear the sign-extended bits.
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
    if packing.single:
        middle = 1 << (packing.bits - 1) if packing.signed else 0
        values = codes.to(torch.int64) - middle
        return values.to(torch_dtype(packing.container)).movedim(-1, dim).contiguous()
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
    # A dimension for the container's bytes: an empty tensor cannot be viewed as bytes without it.
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
