# SPDX-License-Identifier: Apache-2.0
"""Weight-only CPU kernels: codes stay packed in memory and are decoded in registers.

Every width from 1 to 8 bits, any group size, bf16/fp16/fp32 weights and activations; AVX-512 with
or without bf16 dot products, AVX2, NEON, or plain C++, whichever the processor has
(``native.isa``). AMX only where it is asked for by name: it passes on hardware and is fast for many
rows only, and the choice does not depend on the number of rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from vllm.compressed_linear.backends.base import Capabilities, QuantLinearMethod
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
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.cost import roofline, vector_share
from vllm.compressed_linear.machine.platform import NATIVE_LIBRARY, Platform
from vllm.compressed_linear.settings import CPU_ISA
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, activation_kinds
from vllm.compressed_linear.spec.elements import ElementType, torch_dtype


@dataclass(frozen=True)
class _Speed:
    """Of one core: weights decoded a second (narrow: up to 5 bits), and the share that multiplying
    reaches of the machine's best rate. Measured on a Zen 4 core; "amx" and "neon" are guesses."""

    arithmetic: str
    efficiency: float
    narrow: float
    wide: float


_SPEEDS = {
    "amx": _Speed("bf16", 0.5, 30e9, 20e9),
    "avx512bf16": _Speed("bf16", 0.95, 50e9, 25e9),
    "avx512": _Speed("fp32", 0.9, 50e9, 27e9),
    "avx2": _Speed("fp32", 0.88, 35e9, 20e9),
    "neon": _Speed("fp32", 0.8, 10e9, 6e9),
    "generic": _Speed("fp32", 0.05, 1e9, 1e9),
}
_PARTS = {"bfloat16": 1, "float16": 2}
"""Number of bf16 terms that sum to an activation of each dtype; float32 is multiplied directly."""
_CALL_SECONDS = 5e-6


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
    batch_invariant = True
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
    def variant(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> str:
        forced = os.environ.get(CPU_ISA)
        if forced:
            return forced
        return platform.isa or platform.best_isa(_SPEEDS)

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        d, weight = descriptor, descriptor.weight
        element = weight.element
        variant = cls.variant(d, platform)
        speed = _SPEEDS.get(variant, _SPEEDS["generic"])
        read = d.n * d.k * element.bits / 8 + scale_bytes(d, d.n)
        decode = 0.0
        if element.kind != "dense":
            rate = speed.narrow if element.bits <= 5 else speed.wide
            decode = d.n * d.k / (rate * platform.threads)
        arithmetic, parts = speed.arithmetic, 1
        table = _table(element)
        wide = element.name in ("fp16", "fp32") or (
            table is not None and table.dtype == torch.float32
        )
        input_dtype = _prepared_dtype(d)
        if wide or input_dtype not in _PARTS:
            arithmetic = "fp32"
        elif arithmetic == "bf16":
            parts = _PARTS[input_dtype]
        return roofline(
            platform,
            read_bytes=read,
            operations=2.0 * m * d.n * d.k * parts,
            arithmetic=arithmetic,
            efficiency=speed.efficiency * vector_share(platform, variant, arithmetic),
            decode_seconds=decode,
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
            name: torch.empty(len(packed), d.groups, native.TILE, dtype=dtype)
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


def _table(element: ElementType) -> torch.Tensor | None:
    """[2^bits] values of an element that is decoded by a table: bfloat16 if all are exact in it,
    else float32. None for other elements."""
    if element.kind not in ("float", "codebook") or _kernel_element(element) == element.name:
        return None
    values = element.table()
    table = values.to(torch.bfloat16)
    return table if torch.equal(table.to(torch.float32), values) else values
