# SPDX-License-Identifier: Apache-2.0
"""vLLM's scaled-mm classes: weights and activations of 8 bits, one scale for each output channel.

How they quantize x, found by reading vLLM 0.32 and its operators:

* they multiply by the reciprocal of a scale, so ties may round to either code: ``slack`` is the
  resulting error
* int8: max|x| falls on 127 and zero points of dynamic x come from a range that need not hold 0, so
  another ``maximum`` and dynamic zero points are declined
* fp8: max|x| falls on 448; a token's scale is never below 1 / (448 · 512), so tokens smaller than
  1 / 512 are coarser
* Hopper's tensor cores add products of fp8 with 13 bits behind the point of the largest, K / 32 of
  them one after the other: ``weight_rounding`` allows for a random walk of that. Not measured
* there are no int8 matrix products of CUTLASS from compute capability 100 on
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm.compressed_linear.backends.vllm_native.adapter import (
    KernelAdapter,
    add_parameter,
    byte_codes,
    scales,
)
from vllm.compressed_linear.backends.vllm_native.classes import scaled_mm
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.activation import quantize_dequantize
from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import E4M3, torch_dtype

INT8_KINDS = frozenset(
    {"int8 dynamic per token", "int8 static per tensor", "int8 static per tensor, asymmetric"}
)
FP8_KINDS = {
    "e4m3 static per tensor": "static tensor",
    "e4m3 dynamic per tensor": "dynamic tensor",
    "e4m3 dynamic per token": "dynamic token",
}
"""Kinds of activations, in our words → in those of ``scaled_mm.fp8_config``."""

_MULTIPLE = 16
_IMPRECISION = 2.0**-20
"""Of a scale whose reciprocal is rounded, and used: a few units in the last place of fp32."""

_SMALLEST_FP8 = {"token": 1 / 512, "group": 1e-10}
"""What the operators take for max|x| of a token, or a group, where it is less."""


@dataclass(frozen=True, kw_only=True)
class _ScaledMm(KernelAdapter):
    """What int8 and fp8 have in common. ``maximum``: what max|x| falls on."""

    maximum: float

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        scale, activation = d.weight.scale, d.activation
        if scale is None:
            yield "weights without scales"
        elif d.groups != 1:
            yield f"groups of {d.group_size} (supported: one scale for each output channel)"
        if d.weight.zero is not None:
            yield "zero points of the weight"
        if d.n % _MULTIPLE or d.k % _MULTIPLE:
            yield f"{d.n}x{d.k} (supported: multiples of {_MULTIPLE})"
        if activation is None:
            yield "it quantizes x, which the descriptor does not"
        elif activation.dynamic and activation.maximum != self.maximum:
            yield f"max|x| falls on {self.maximum:g}, the descriptor has {activation.maximum:g}"

    def prepared_bytes(self, d: CompressedLinearDescriptor) -> int:
        return d.n * d.k + 4 * d.n

    def _scales(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.Tensor:
        """fp32 [N, 1]."""
        return scales(d, weights).to(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Int8(_ScaledMm):
    """One of vLLM's subclasses of ``Int8ScaledMMLinearKernel``."""

    maximum: float = 127.0
    arithmetic: str = "int8"
    family = "int8"

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        yield from super().reasons(d)
        element, activation = d.weight.element, d.activation
        if element.bits != 8 or element.bias != 128:
            yield f"{element.name} weights (supported: 8 bits around 128)"
        if activation is not None and activation.kind not in INT8_KINDS:
            yield f"x as {activation.kind} (supported: {', '.join(sorted(INT8_KINDS))})"

    def config(self, d: CompressedLinearDescriptor) -> object:
        assert d.activation is not None
        return scaled_mm.int8_config(
            static=not d.activation.dynamic, symmetric=d.activation.symmetric
        )

    def build(self, kernel: Any, d: CompressedLinearDescriptor) -> Any:
        return kernel(self.config(d), layer_param_names=scaled_mm.INT8_NAMES)

    def attributes(self, d: CompressedLinearDescriptor) -> dict[str, Any]:
        return {"logical_widths": [d.n]}

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        layer = torch.nn.Module()
        add_parameter(layer, "weight", (byte_codes(d, weights) ^ 128).view(torch.int8))
        add_parameter(layer, "weight_scale", self._scales(d, weights))
        if weights.input_scale is not None and not _dynamic(d):
            add_parameter(layer, "input_scale", weights.input_scale)
        if weights.input_zero is not None and not _dynamic(d):
            add_parameter(layer, "input_zero_point", weights.input_zero)
        return layer

    def repack(self, kernel: Any, layer: torch.nn.Module, d: CompressedLinearDescriptor) -> None:
        known = {
            name: layer.get_parameter(name).data.clone()
            for name in ("input_scale", "input_zero_point")
            if name in layer._parameters
        }
        super().repack(kernel, layer, d)
        if len(known) == 2:
            # vLLM goes through the range and back, and cuts the zero point off: it may be one less.
            scale, zero = known.values()
            weight = layer.get_parameter("weight").data
            add_parameter(layer, "input_scale", scale)
            add_parameter(layer, "input_zero_point", zero)
            sums = weight.sum(dim=0, keepdim=True, dtype=torch.int32)
            add_parameter(layer, "azp_adj", zero * sums)

    def weight_rounding(self, d: CompressedLinearDescriptor) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Fp8(_ScaledMm):
    """``CutlassFP8ScaledMMLinearKernel``, and what differs from it in a few things. ``scales_of``:
    what has a scale of the weight in the class's eyes, "channel" or "tensor"."""

    scales_of: str = "channel"
    maximum: float = 448.0
    arithmetic: str = "fp8"
    family = "fp8"

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        yield from super().reasons(d)
        if d.activation is not None and d.activation.kind not in FP8_KINDS:
            yield f"x as {d.activation.kind} (supported: {', '.join(sorted(FP8_KINDS))})"

    def config(self, d: CompressedLinearDescriptor) -> object:
        assert d.activation is not None
        return scaled_mm.fp8_config(
            d.n,
            d.k,
            torch_dtype(d.input_dtype),
            weight=self.scales_of,
            activation=FP8_KINDS[d.activation.kind],
            out_dtype=self.result_dtype(d),
        )

    def build(self, kernel: Any, d: CompressedLinearDescriptor) -> Any:
        built = kernel(self.config(d), layer_param_names=scaled_mm.FP8_NAMES)
        built.logical_output_size = d.n
        return built

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        layer = torch.nn.Module()
        codes = byte_codes(d, weights).view(torch.float8_e4m3fn)
        add_parameter(layer, "weight", codes.t())
        add_parameter(layer, "weight_scale", self._scales(d, weights))
        if weights.input_scale is not None and not _dynamic(d):
            add_parameter(layer, "input_scale", weights.input_scale)
        return layer

    def weight_rounding(self, d: CompressedLinearDescriptor) -> float:
        return float((d.k / 32) ** 0.5 * 2.0**-13)


def _dynamic(d: CompressedLinearDescriptor) -> bool:
    return d.activation is not None and d.activation.dynamic


def slack(
    spec: ActivationSpec,
    x: torch.Tensor,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
) -> torch.Tensor:
    """fp32 [M, k]: how far what vLLM's operators make of x [M, k] may lie from its definition."""
    exact = quantize_dequantize(x, spec, input_scale, input_zero)
    out = torch.zeros_like(exact)
    for nudge in (1 - _IMPRECISION, 1 + _IMPRECISION):
        other = quantize_dequantize(x, spec, input_scale, input_zero, nudge=nudge)
        out = torch.maximum(out, (other - exact).abs())
    smallest = _SMALLEST_FP8.get(spec.granularity)
    if (spec.element, spec.scale_dtype) == (E4M3, "float32") and smallest is not None:
        members = x if spec.granularity == "token" else x.unflatten(1, (-1, spec.group_size))
        small = (
            (members.abs().amax(-1, keepdim=True) < smallest).expand_as(members).reshape(x.shape)
        )
        # Both lie within half a step of x, in their own steps.
        step = smallest / 448 * 2.0**-9
        out = torch.where(small, x.abs() * 2.0**-3 + step, out)
    return out


KERNELS: tuple[KernelAdapter, ...] = (
    Int8(
        kernel="CutlassInt8ScaledMMLinearKernel",
        tag="cutlassint8",
        ops=(
            "_C::dynamic_scaled_int8_quant",
            "_C::static_scaled_int8_quant",
            "_C::cutlass_scaled_mm",
            "_C::cutlass_scaled_mm_azp",
        ),
        max_capability=90,
    ),
    Int8(
        kernel="TritonInt8ScaledMMLinearKernel",
        tag="tritonint8",
        ops=("_C::dynamic_scaled_int8_quant", "_C::static_scaled_int8_quant"),
        devices=frozenset({"cuda", "rocm"}),
        efficiency=0.4,
    ),
    Fp8(
        kernel="CutlassFP8ScaledMMLinearKernel",
        tag="cutlassfp8",
        ops=(
            "_C::dynamic_scaled_fp8_quant",
            "_C::dynamic_per_token_scaled_fp8_quant",
            "_C::static_scaled_fp8_quant",
            "_C::cutlass_scaled_mm",
        ),
    ),
)
