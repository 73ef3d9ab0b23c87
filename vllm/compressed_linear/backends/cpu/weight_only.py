# SPDX-License-Identifier: Apache-2.0
"""Weight-only CPU kernels: codes stay packed in memory and are decoded in registers.

Every width from 1 to 8 bits, any group size, bf16/fp16/fp32 weights and activations; AMX, AVX-512
with bf16 dot products, with byte dot products of integers or e2m1 and digits of x, or without
either, AVX2, NEON, or plain C++, whichever is fastest on the processor for the number of tokens of
a call (``paths.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch

from vllm.compressed_linear.backends.base import Capabilities, QuantLinearMethod
from vllm.compressed_linear.backends.contract import STANDARD, Contract
from vllm.compressed_linear.backends.cpu import paths
from vllm.compressed_linear.backends.cpu.costs import CallClass
from vllm.compressed_linear.backends.cpu.packing import new_packed, pack_codes, pack_scales
from vllm.compressed_linear.backends.cpu.product import make_problem, multiply, operands
from vllm.compressed_linear.backends.shared.side_tensors import (
    scale_bytes,
    scale_dtype,
    small_bytes,
    small_tensors,
    zero_dtype,
)
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine import arena, native
from vllm.compressed_linear.machine.cost import overlapped
from vllm.compressed_linear.machine.platform import NATIVE_LIBRARY, Platform
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, activation_kinds
from vllm.compressed_linear.spec.elements import ElementType, torch_dtype

_CALL_SECONDS = 5e-6
_BLOCK, _SEGMENT = 32, 128
"""Input channels of a block of the layout, and most that digits of x are made for at once."""

DIGITS_ROUNDING = 1.07 * 2.0**-23
"""Half the last digit's step, of the largest |x|. A step more than 2⁻²³ where three digits would
overflow, and where |x̂| is more than |x| because x is quantized."""


class CpuBackend(QuantLinearMethod):
    """Weight-only kernels on the packed layout of ``csrc/layouts/planes.h``.

    Prepared tensors (T = ceil(N / 16) tiles): ``packed`` uint8 [T, bytes]; ``scale`` and ``zero``
    [T, G, 16] with the output channels of a tile innermost, in the checkpoint's dtype (uint8 for
    e8m0); ``row_scale`` float32 [N]; ``prescale`` float32 [K]; ``input_scale`` float32 [1];
    ``input_zero`` int32 [1]; ``perm`` int32 [K]; ``table`` [2^bits] for floats below 8 bits
    and codebooks, bfloat16 or, where that is not exact, float32; ``problem`` int64, the constants
    of a call (``make_problem`` of ``csrc/ops/ops.cpp``). Only ``packed`` and ``problem`` are always
    there.
    """

    name = "cpu"
    capabilities = Capabilities(
        devices=frozenset({"cpu"}),
        integer_bits=frozenset(range(1, 9)),
        other_elements=frozenset(element.name for element in elements.ALL_FLOATS),
        codebooks=True,
        scale_dtypes=frozenset({"bfloat16", "float16", "float32", "float8_e4m3fn", "e8m0"}),
        row_scale=True,
        activations=activation_kinds(),
        prescale=True,
        zero_kinds=frozenset({"integer", "float"}),
        channel_order=True,
        padded_order=True,
        lookup=True,
        required_ops=(NATIVE_LIBRARY,),
    )

    def __init__(self, descriptor: CompressedLinearDescriptor) -> None:
        super().__init__(descriptor)
        paths.install_here()
        # Made here because the compiler may hold ``bits`` symbolic, and a string must not be.
        self.element = _kernel_element(descriptor.weight.element)
        self.output_dtype = torch_dtype(descriptor.output_dtype)

    @classmethod
    def further_reasons(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> Iterable[str]:
        element = descriptor.weight.element
        if descriptor.k == 0:
            yield "no input channels (K = 0)"
        if element.codebook and element.bits > 7:
            yield f"codebook {element.name} of {element.bits} bits (supported: up to 7)"

    @classmethod
    def call_class(cls, d: CompressedLinearDescriptor) -> CallClass:
        """The calls whose paths those of ``d`` take."""
        element, table = d.weight.element, _table(d.weight.element)
        if element.name in ("fp16", "fp32") or (table is not None and table.dtype == torch.float32):
            weights = "wide"
        elif element.kind == "dense":
            weights = "bf16"
        elif _takes_digits(d):
            weights = "int" if element.bits < 8 else "int8"
        else:
            weights = "narrow" if element.bits < 8 else "bytes"
        return CallClass("floats", weights, _prepared_dtype(d))

    @classmethod
    def contract(cls, descriptor: CompressedLinearDescriptor) -> Contract:
        # On every platform, since a path with digits of x (csrc/cpu/float/digits.h) may take any M.
        d = descriptor
        if cls.call_class(d).weights not in ("int", "int8"):
            return STANDARD
        group = d.group_size if d.groups > 1 else _SEGMENT
        return Contract(input_rounding=DIGITS_ROUNDING, input_group=group)

    @classmethod
    def variant(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> str:
        return paths.in_words(paths.paths_of(cls.call_class(descriptor), platform))

    @classmethod
    def prepared_variant(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> str:
        # All instruction sets read one layout, and a call picks one.
        return ""

    @classmethod
    def rows_are_independent(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> bool:
        return len(paths.paths_of(cls.call_class(descriptor), platform)) == 1

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        d, call = descriptor, cls.call_class(descriptor)
        isa = paths.path_at(paths.paths_of(call, platform), m)
        return overlapped(
            platform,
            read_bytes=d.n * d.k * d.weight.element.bits / 8 + scale_bytes(d, d.n),
            cycles=paths.cost_of(isa, call).cycles(call, platform.rates, m, d.n * d.k),
            call_seconds=_CALL_SECONDS,
        )

    @classmethod
    def hardware_tested(cls, platform: Platform, variant: str = "") -> bool:
        # The kernels for Arm have run in qemu only.
        return platform.device == "cpu" and "neon" not in platform.features

    @classmethod
    def prepared_bytes(cls, descriptor: CompressedLinearDescriptor) -> int | None:
        if native.available() is not None:
            return None
        d, weight = descriptor, descriptor.weight
        tiles, tile_bytes = torch.ops.compressed_linear.packed_shape(
            "planes", d.n, d.k, d.group_size, _kernel_element(weight.element)
        )
        total = tiles * (tile_bytes + scale_bytes(d, native.TILE)) + native.PROBLEM_BYTES
        total += small_bytes(d, d.activation)
        table = _table(weight.element)
        if table is not None:
            total += table.nbytes
        return total

    @classmethod
    def layout_version(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> str | None:
        return native.layout_id("planes")

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        native.load()
        d = self.descriptor
        packed = new_packed(d, self.element, "planes")
        pack_codes(packed, weights, d, self.element, "planes")
        tensors = {
            name: arena.empty((len(packed), d.groups, native.TILE), dtype)
            for name, dtype in (("scale", scale_dtype(d)), ("zero", zero_dtype(d)))
            if dtype is not None
        }
        pack_scales(tensors, weights, d)
        tensors["packed"] = packed
        tensors |= small_tensors(weights, d.activation)
        table = _table(d.weight.element)
        if table is not None:
            tensors["table"] = table
        tensors["problem"] = make_problem("planes", d, self.element, d.activation, tensors)
        return tensors

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return multiply(tensors, x, bias, self.descriptor.n, self.output_dtype)

    def embedding(self, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        d = self.descriptor
        out = torch.ops.compressed_linear.embedding(
            ids.reshape(-1).contiguous(),
            tensors["problem"],
            operands(tensors),
            d.in_features,
            self.output_dtype,
        )
        return out.reshape(*ids.shape, d.in_features)


def _prepared_dtype(d: CompressedLinearDescriptor) -> str:
    """The narrowest dtype that represents x̂ exactly."""
    if d.activation is None:
        return d.input_dtype if d.prescale is None else "float32"
    # Only scales of groups that are no powers of two stay in x; others keep few bits, or are
    # multiplied in behind the sum.
    grouped = d.activation.granularity == "group"
    return "float32" if grouped and d.activation.scale_dtype == "float32" else "bfloat16"


def _kernel_element(element: ElementType) -> str:
    # The kernels decode 8-bit floats by arithmetic, smaller ones by a table of their codes.
    by_name = element.kind == "dense" or (element.kind == "float" and element.bits == 8)
    return element.name if by_name else f"uint{element.bits}"


def _takes_digits(d: CompressedLinearDescriptor) -> bool:
    """As ``takes_digits`` of ``csrc/cpu/common/paths.cpp``."""
    if d.groups > 1 and d.group_size % _BLOCK and 2 * d.group_size != _BLOCK:
        return False
    element = d.weight.element
    return element.kind == "integer" or (element.bits == 4 and _fits_bytes(element))


@lru_cache(maxsize=64)
def _fits_bytes(element: ElementType) -> bool:
    """Whether the values of an element of 4 bits are steps of a power of two, as many as a byte
    counts (``csrc/cpu/common/byte_codes.h``)."""
    table = _table(element)
    if table is None or table.dtype == torch.float32:
        return False
    for exponent in range(8):
        steps = table.double() * 2**exponent
        if bool((steps.abs() < 256).all()) and torch.equal(steps, steps.round()):
            return bool(steps.max().clamp(min=0) - steps.min().clamp(max=0) <= 255)
    return False


def _table(element: ElementType) -> torch.Tensor | None:
    """[2^bits] values of an element that is decoded by a table: bfloat16 if all are exact in it,
    else float32. None for other elements."""
    if element.kind not in ("float", "codebook") or _kernel_element(element) == element.name:
        return None
    values = element.table()
    table = values.to(torch.bfloat16)
    return table if torch.equal(table.to(torch.float32), values) else values
