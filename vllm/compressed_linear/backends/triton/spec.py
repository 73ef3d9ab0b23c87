# SPDX-License-Identifier: Apache-2.0
"""Compile-time constants of the Triton kernel: layout, decoding and multiplication of codes.

Tensor cores multiply bf16, fp16 or tf32 and accumulate in fp32, so ŵ stays unrounded only if their
operands are exact:

* integers less their middle code, or less an integer zero point, are exact in bf16 and in fp16, and
  so are floats of up to 8 bits. Scales are multiplied into the sums of a group, in fp32, and other
  zero points are subtracted from them times Σ_g x.
* small floats under small scales (NVFP4: e2m1 times e4m3; MX: anything times a power of two) are
  exact as a product, and are multiplied together before the sum. Their groups are short.
* a codebook whose entries are not exact is split into parts that are (tf32 with fp16
  activations), and each part is multiplied. fp32 activations are split into three bf16 parts.
* both at once is multiplied in fp32, without tensor cores.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass

import torch

from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import E2M1, E4M3, E5M2, ElementType

WORD_BITS = 32
COLUMN_MULTIPLE = 128
"""Output channels are padded to a multiple of this, so that no tile needs a mask."""

_BLOCKS = (128, 64, 32, 16)
"""Input channels that one step of the kernel may take; tensor cores take at least 16."""
_LARGEST_WASTE = 1.125
_FOLDED_GROUP = 64
"""Groups below this have their scales multiplied in before the sum, where that is exact."""


@dataclass(frozen=True)
class KernelSpec:
    """Constants of one weight, the same for every M.

    ``channels`` of x; ``k``: those that are multiplied, after a gather; ``segment`` of them lie
    together, filled up with zeros to ``filled``.
    ``group_size``: input channels that share a scale. ``bits`` of a code, and what it is: an
    integer of which ``offset`` is subtracted, a float of ``exponent`` and ``mantissa`` bits, or a
    place in a table (``coded`` "integer", "float" or "table"). ``scaling``: "row" (after the sum,
    one scale for each output channel), "block" (sums of a group) or "element" (before the sum).
    ``zero``: "" for none, "before" (subtracted from the code) or "after" (from the sum), then plus
    ``zero_shift``. ``operand``: what is multiplied, "bf16", "fp16", "tf32" or "fp32", with
    ``x_parts`` or ``w_parts`` of it summing up to x or to the decoded weight. ``hadamard`` and
    ``activation``, the JSON of an ``ActivationSpec`` or "", are what is done to x first.
    """

    channels: int
    k: int
    segment: int
    filled: int
    group_size: int
    bits: int
    coded: str
    offset: int
    exponent: int
    mantissa: int
    scaling: str
    zero: str
    zero_shift: int
    operand: str
    x_parts: int
    w_parts: int
    hadamard: int
    activation: str

    @property
    def k_filled(self) -> int:
        """Input channels as they are stored, with those of zeros."""
        return self.k // self.segment * self.filled

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the bit planes a code is stored in, lowest bits first."""
        return planes(self.bits)

    @property
    def decoding(self) -> dict[str, int | str | bool]:
        """What every kernel that decodes codes is compiled for."""
        return {
            "BITS": self.bits,
            "CODED": self.coded,
            "OFFSET": self.offset,
            "EXPONENT": self.exponent,
            "MANTISSA": self.mantissa,
            "ZERO_SHIFT": self.zero_shift,
        }

    @property
    def text(self) -> str:
        """As JSON, for ops, whose arguments are tensors and plain values."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    @functools.cache
    def parse(cls, text: str) -> KernelSpec:
        """The inverse of ``text``."""
        return cls(**json.loads(text))

    @functools.cached_property
    def quantized_as(self) -> ActivationSpec | None:
        """Quantization of x."""
        return ActivationSpec.from_json(json.loads(self.activation)) if self.activation else None

    @classmethod
    def of(cls, d: CompressedLinearDescriptor) -> KernelSpec:
        """The constants of ``d``, which must have coded weights and K > 0."""
        element, zero = d.weight.element, d.weight.zero
        operand, x_parts, w_parts = _operand(element, taken_dtype(d))
        # Codes of 9 bits and more after a subtraction would not be exact.
        before = zero is not None and zero.kind == "integer" and element.bias == 0
        before = before and element.kind == "integer"
        scaling = _scaling(d, operand, after=zero is not None and not before)
        segment = d.group_size if scaling == "block" else d.k
        centre = 1 << (element.bits - 1) if element.kind == "integer" else 0
        centred = zero is not None and not before
        return cls(
            channels=d.in_features,
            k=d.k,
            segment=segment,
            filled=_filled(segment, element.bits, d.group_size if scaling == "element" else 1),
            group_size=d.group_size,
            bits=element.bits,
            # Arithmetic takes more instructions than a look into shared memory.
            coded=element.kind if element.kind == "integer" or element in (E4M3, E5M2) else "table",
            offset=centre if centred else element.bias,
            exponent=element.exponent,
            mantissa=element.mantissa,
            scaling=scaling,
            zero="" if zero is None else "before" if before else "after",
            zero_shift=element.bias - centre if centred else 0,
            operand=operand,
            x_parts=x_parts,
            w_parts=w_parts,
            hadamard=0 if d.transform is None else d.transform.block,
            activation="" if d.activation is None else d.activation.text,
        )


def planes(bits: int) -> tuple[int, ...]:
    """Powers of two that add up to ``bits``, the largest first: it holds the lowest bits."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def taken_dtype(d: CompressedLinearDescriptor) -> str:
    """The narrowest dtype that represents x̂ exactly."""
    if d.activation is not None and d.activation.scale_dtype == "e8m0":
        # At most four bits times a power of two.
        return "bfloat16"
    if d.activation is not None or d.prescale is not None or d.transform is not None:
        return "float32"
    return d.input_dtype


def _operand(element: ElementType, taken: str) -> tuple[str, int, int]:
    """(what is multiplied, parts of x, parts of the weight) for x̂ of a dtype."""
    in_bf16 = _parts(element, 8)
    if taken == "float16":
        exact = torch.equal(element.table().to(torch.float16).float(), element.table())
        if element.kind != "codebook" or exact:
            return "fp16", 1, 1
        return "tf32", 1, _parts(element, 11)
    if taken == "bfloat16":
        return "bf16", 1, in_bf16
    return ("bf16", 3, 1) if in_bf16 == 1 else ("fp32", 1, 1)


def _parts(element: ElementType, significant: int) -> int:
    """Numbers of so many significant bits, each cut off and not rounded, that add up to any entry
    of a codebook; other elements are one."""
    if element.kind != "codebook":
        return 1
    rest, parts = element.table(), 0
    while bool((rest != 0).any()):
        kept = rest.view(torch.int32) & -(1 << (24 - significant))
        rest, parts = rest - kept.view(torch.float32), parts + 1
    return max(parts, 1)


def _scaling(d: CompressedLinearDescriptor, operand: str, *, after: bool) -> str:
    scale, element = d.weight.scale, d.weight.element
    if d.groups == 1 and not after:
        return "row"
    # fp16 has too small a range for powers of two.
    powers = scale is not None and scale.dtype == "e8m0" and operand == "bf16"
    powers = powers and element.kind != "codebook"
    tiny = scale is not None and scale.dtype == "float8_e4m3fn" and element == E2M1
    short = d.group_size < _FOLDED_GROUP and _FOLDED_GROUP % d.group_size == 0
    exact = (powers or tiny) and operand in ("bf16", "fp16")
    return "element" if exact and short and not after else "block"


def _filled(segment: int, bits: int, group_size: int) -> int:
    """``segment`` rounded up to a multiple of a block: the largest that wastes little."""
    # A word of a plane is no longer than a block, nor are groups whose scales go before the sum.
    smallest = max(16, WORD_BITS // min(planes(bits)), group_size)
    for block in _BLOCKS:
        filled = -(-segment // block) * block
        if block <= smallest or filled <= segment * _LARGEST_WASTE:
            break
    return filled
