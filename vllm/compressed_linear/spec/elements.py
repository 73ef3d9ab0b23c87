# SPDX-License-Identifier: Apache-2.0
"""Element types: the numeric value of a stored code.

A code is an unsigned integer of ``bits`` bits. ``ElementType.decode`` maps codes to exact fp32
values, without any scale or zero point. Types of 16 and 32 bits are not stored as codes: their
tensors hold the numbers themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

_FLOAT_NAMES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}

DTYPE_NAMES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "uint32": torch.uint32,
    "int64": torch.int64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """The name used in descriptors for ``dtype``, e.g. ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a tensor that a descriptor names so (``"e8m0"`` is stored as uint8).

    Raises ``ValueError`` for an unknown name.
    """
    if name == E8M0.name:
        return torch.uint8
    try:
        return DTYPE_NAMES[name]
    except KeyError:
        raise ValueError(f"unknown dtype {name!r} (known: {', '.join(DTYPE_NAMES)})") from None


@dataclass(frozen=True)
class ElementType:
    """One kind of stored number.

    Exactly one of these meanings holds:

    * integer (``exponent == 0``, no ``codebook``): value = code − ``bias``
    * small float (``exponent > 0``): sign, exponent and mantissa fields as OCP FP8/MX define them;
      ``unsigned`` drops the sign bit (e8m0 has neither sign nor mantissa)
    * codebook: value = ``codebook[code]``
    * ``bits`` of 16 or 32: the tensor holds the numbers, ``name`` is bf16, fp16 or fp32
    """

    name: str
    bits: int
    bias: int = 0
    exponent: int = 0
    mantissa: int = 0
    unsigned: bool = False
    codebook: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (*range(1, 9), 16, 32):
            raise ValueError(
                f"element type {self.name}: {self.bits} bits (supported: 1..8, 16, 32)"
            )
        if self.codebook and len(self.codebook) != 1 << self.bits:
            raise ValueError(
                f"element type {self.name}: codebook of {len(self.codebook)} entries, "
                f"expected {1 << self.bits}"
            )

    @property
    def kind(self) -> str:
        """``"integer"``, ``"float"``, ``"codebook"`` or ``"dense"`` (16 and 32 bits)."""
        if self.bits > 8:
            return "dense"
        if self.codebook:
            return "codebook"
        return "float" if self.exponent else "integer"

    @property
    def dense_dtype(self) -> torch.dtype:
        """The torch dtype of a dense type; ``ValueError`` for coded ones."""
        if self.kind != "dense":
            raise ValueError(f"{self.name} is stored as codes, not in a dense dtype")
        return _FLOAT_NAMES[self.name]

    def table(self) -> torch.Tensor:
        """fp32 [2^bits]: the value of every code (coded types only)."""
        return _table(self).clone()

    @property
    def largest(self) -> float:
        """The largest finite value."""
        if self.kind == "dense":
            return torch.finfo(self.dense_dtype).max
        table = _table(self)
        return float(table[torch.isfinite(table)].max())

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (any integer dtype, any shape) or dense values → fp32 of the same shape."""
        if self.kind == "dense":
            return codes.to(torch.float32)
        if self.kind == "integer":
            return codes.to(torch.float32) - self.bias
        if self.name == "e8m0":
            return _power_of_two(codes)
        return _table(self).to(codes.device)[codes.to(torch.int64)]

    def __str__(self) -> str:
        return self.name


@cache
def _table(element: ElementType) -> torch.Tensor:
    if element.kind == "dense":
        raise ValueError(f"{element.name} has no code table")
    codes = torch.arange(1 << element.bits)
    if element.codebook:
        return torch.tensor(element.codebook, dtype=torch.float32)
    if element.kind == "integer":
        return (codes - element.bias).to(torch.float32)
    return _small_float_table(element)


def _power_of_two(codes: torch.Tensor) -> torch.Tensor:
    """Decode E8M0 codes to fp32 powers of two. Computed, since a table would have to be copied to
    the codes' device, and a captured GPU graph must not contain such a copy."""
    exponents = codes.to(torch.int32)
    # The smallest is subnormal in fp32, and the last code is NaN.
    bits = (exponents << 23).masked_fill_(exponents == 0, 0x00400000)
    return bits.masked_fill_(exponents == 255, 0x7FC00000).view(torch.float32)


def _small_float_table(element: ElementType) -> torch.Tensor:
    if element.name == "e8m0":
        table = torch.exp2(torch.arange(256, dtype=torch.float64) - 127)
        table[255] = float("nan")
        return table.to(torch.float32)
    if element.name in ("e4m3", "e5m2"):
        dtype = torch.float8_e4m3fn if element.name == "e4m3" else torch.float8_e5m2
        return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)
    # fp4 and fp6 have neither infinities nor NaN (OCP MX v1.0, 5.3).
    e_bits, m_bits = element.exponent, element.mantissa
    exponent_bias = (1 << (e_bits - 1)) - 1
    values = []
    for code in range(1 << element.bits):
        sign = -1.0 if code >> (e_bits + m_bits) else 1.0
        exponent = (code >> m_bits) & ((1 << e_bits) - 1)
        fraction = (code & ((1 << m_bits) - 1)) / (1 << m_bits)
        magnitude = (
            (1 + fraction) * 2.0 ** (exponent - exponent_bias)
            if exponent
            else fraction * 2.0 ** (1 - exponent_bias)
        )
        values.append(sign * magnitude)
    return torch.tensor(values, dtype=torch.float32)


def uint(bits: int, bias: int = 0) -> ElementType:
    """``uint(4, 8)`` is the symmetric 4-bit integer whose code 8 means 0 ("uint4b8")."""
    if not 1 <= bits <= 8:
        raise ValueError(f"integer element of {bits} bits (supported: 1..8)")
    return ElementType(f"uint{bits}b{bias}" if bias else f"uint{bits}", bits, bias=bias)


BF16 = ElementType("bf16", 16)
FP16 = ElementType("fp16", 16)
FP32 = ElementType("fp32", 32)
E4M3 = ElementType("e4m3", 8, exponent=4, mantissa=3)
E5M2 = ElementType("e5m2", 8, exponent=5, mantissa=2)
E3M2 = ElementType("e3m2", 6, exponent=3, mantissa=2)
E2M3 = ElementType("e2m3", 6, exponent=2, mantissa=3)
E2M1 = ElementType("e2m1", 4, exponent=2, mantissa=1)
SMALL_FLOATS = (E4M3, E5M2, E3M2, E2M3, E2M1)
ALL_FLOATS = (BF16, FP16, FP32, *SMALL_FLOATS)
"""Float types of weights. E8M0 is for scales only."""
E8M0 = ElementType("e8m0", 8, exponent=8, unsigned=True)
INT8 = uint(8, 128)
NF4 = ElementType(
    "nf4",
    4,
    codebook=(
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
"""The 16 quantiles of the normal distribution of QLoRA (arXiv 2305.14314, appendix E)."""


def scale_dtype_name(dtype: torch.dtype) -> str:
    """Name of the dtype of stored scales; uint8 scales are E8M0 exponents."""
    return "e8m0" if dtype in (torch.uint8, torch.float8_e8m0fnu) else dtype_name(dtype)


def widen_scale(scale: torch.Tensor) -> torch.Tensor:
    """Widen stored scales of any shape to fp32; uint8 scales are E8M0: 2^(code − 127), 255 NaN."""
    return E8M0.decode(scale) if scale.dtype == torch.uint8 else scale.to(torch.float32)


def dense(dtype: torch.dtype) -> ElementType:
    """The element type of an unquantized tensor of ``dtype``."""
    for element in (BF16, FP16, FP32):
        if element.dense_dtype == dtype:
            return element
    raise ValueError(f"no dense element type for {dtype} (known: bfloat16, float16, float32)")
