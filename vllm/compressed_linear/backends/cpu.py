# SPDX-License-Identifier: Apache-2.0
"""Our own CPU kernels: codes stay packed in memory and are decoded in registers.

Every width from 1 to 8 bits, any group size, bf16/fp16/fp32 weights and activations; AVX-512 with
bf16 dot products, AVX2, or plain C++, whichever the processor has (``native.isa``).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch

from vllm.compressed_linear import native, numerics
from vllm.compressed_linear.backend import Capabilities, QuantLinearMethod
from vllm.compressed_linear.backends.cpu_preparation import pack_codes, pack_scales
from vllm.compressed_linear.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.numerics import ElementType, torch_dtype
from vllm.compressed_linear.platform import NATIVE_LIBRARY, Platform
from vllm.compressed_linear.settings import CPU_ISA
from vllm.compressed_linear.weights import CompressedWeights

"""Forces an instruction set: avx512bf16, avx2 or generic."""

# How far from the memory limit a single row runs (4 bits, one thread of a Zen 5 core).
_SLOWDOWN = {"avx512bf16": 1.5, "avx2": 8.0, "generic": 60.0}


class CpuBackend(QuantLinearMethod):
    """Weight-only kernels on the packed layout of ``csrc/cpu/layout.h``.

    Prepared tensors (T = ceil(N / 16) tiles): ``packed`` uint8 [T, bytes]; ``scale`` and ``zero``
    [T, G, 16] with the output channels of a tile innermost, in the checkpoint's dtype (uint8 for
    e8m0); ``row_scale`` float32 [N]; ``perm`` int32 [K]; ``table`` [2^bits] for floats below 8 bits
    and codebooks, bfloat16 or, where that is not exact, float32. Only ``packed`` is always there.
    """

    name = "cpu"
    batch_invariant = True
    capabilities = Capabilities(
        devices=frozenset({"cpu"}),
        integer_bits=frozenset(range(1, 9)),
        other_elements=frozenset(
            element.name
            for element in (
                numerics.BF16,
                numerics.FP16,
                numerics.FP32,
                numerics.E2M1,
                numerics.E4M3,
                numerics.E5M2,
                numerics.E2M3,
                numerics.E3M2,
            )
        ),
        codebooks=True,
        scale_dtypes=frozenset({"bfloat16", "float16", "float32", "float8_e4m3fn", "e8m0"}),
        granularities=frozenset({"tensor", "channel", "group", "block"}),
        row_scale=True,
        zero_kinds=frozenset({"integer", "float"}),
        channel_order=True,
        padded_order=True,
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
        if {"avx512", "avx512_bf16"} <= platform.features:
            return "avx512bf16"
        return "avx2" if "avx2" in platform.features else "generic"

    @classmethod
    def cost(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> float:
        weight = descriptor.weight
        per_weight = weight.element.bits / 8
        for spec in (weight.scale, weight.zero):
            if spec is not None:
                per_weight += 2 / descriptor.group_size
        slowdown = _SLOWDOWN.get(cls.variant(descriptor, platform), 1.0)
        return descriptor.n * descriptor.k * per_weight * slowdown

    @classmethod
    def prepared_bytes(cls, descriptor: CompressedLinearDescriptor) -> int | None:
        if native.available() is not None:
            return None
        d, weight = descriptor, descriptor.weight
        tiles = -(-d.n // native.TILE)
        per_tile = torch.ops.compressed_linear.packed_tile_bytes(
            d.k, d.group_size, _kernel_element(weight.element)
        )
        for dtype in (_scale_dtype(d), _zero_dtype(d)):
            if dtype is not None:
                per_tile += d.groups * native.TILE * dtype.itemsize
        total = tiles * per_tile
        if d.channel_order is not None:
            total += d.k * torch.int32.itemsize
        table = _table(weight.element)
        if table is not None:
            total += table.numel() * table.itemsize
        if weight.row_scale is not None:
            total += d.n * torch.float32.itemsize
        return total

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        native.load()
        ops = torch.ops.compressed_linear
        d = self.descriptor
        tiles = -(-d.n // native.TILE)
        tile_bytes = ops.packed_tile_bytes(d.k, d.group_size, self.element)
        packed = torch.empty(tiles, tile_bytes, dtype=torch.uint8)
        pack_codes(packed, weights, d, self.element)
        tensors = {
            name: torch.empty(tiles, d.groups, native.TILE, dtype=dtype)
            for name, dtype in (("scale", _scale_dtype(d)), ("zero", _zero_dtype(d)))
            if dtype is not None
        }
        pack_scales(tensors, weights, d)
        tensors["packed"] = packed
        if weights.permutation is not None:
            tensors["perm"] = weights.permutation.to(torch.int32).contiguous()
        if weights.row_scale is not None:
            tensors["row_scale"] = weights.row_scale.contiguous()
        table = _table(d.weight.element)
        if table is not None:
            tensors["table"] = table
        return tensors

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        d = self.descriptor
        out = torch.ops.compressed_linear.linear(
            x.reshape(-1, x.shape[-1]),
            tensors["packed"],
            tensors.get("scale"),
            tensors.get("zero"),
            bias,
            tensors.get("perm"),
            tensors.get("table"),
            d.n,
            d.k,
            d.group_size,
            self.element,
            d.weight.element.bias,
            self.output_dtype,
            tensors.get("row_scale"),
        )
        return out.reshape(*x.shape[:-1], d.out_features)


def _kernel_element(element: ElementType) -> str:
    # The kernels decode 8-bit floats by arithmetic, smaller ones by a table of their codes.
    by_name = element.kind == "dense" or (element.kind == "float" and element.bits == 8)
    return element.name if by_name else f"uint{element.bits}"


def _scale_dtype(d: CompressedLinearDescriptor) -> torch.dtype | None:
    return None if d.weight.scale is None else torch_dtype(d.weight.scale.dtype)


def _zero_dtype(d: CompressedLinearDescriptor) -> torch.dtype | None:
    zero = d.weight.zero
    if zero is None:
        return None
    # Zero points of integers go up to 2^bits, which bfloat16 holds exactly.
    return torch.bfloat16 if zero.kind == "integer" else torch_dtype(zero.dtype)


def _table(element: ElementType) -> torch.Tensor | None:
    """[2^bits] values of an element that is decoded by a table: bfloat16 if all are exact in it,
    else float32. None for other elements."""
    if element.kind not in ("float", "codebook") or _kernel_element(element) == element.name:
        return None
    values = element.table()
    table = values.to(torch.bfloat16)
    return table if torch.equal(table.to(torch.float32), values) else values
