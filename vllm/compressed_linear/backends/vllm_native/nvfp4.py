# SPDX-License-Identifier: Apache-2.0
"""NVFP4 weights under NVFP4 activations: vLLM's CUTLASS class, and torch's scaled product.

What the classes do not say, found by reading vLLM 0.32 and the source of its operators:

* scales of groups have no sign for the tensor cores: that of a negative one goes into its codes
* there is one second-level scale for the layer, and one number is made of it and the static scale
  of x. Where rows differ (fused layers), the largest goes to the kernel and what remains of each
  row is multiplied with the result. Layers whose inputs have different scales are several parts
* x is quantized with reciprocals that the GPU approximates, so a group's scale and then its codes
  may each become either of two neighbours: ``slack`` says how much that can be
* N and K are padded to multiples of 32 with zeros, the scales' rows to 128 and groups to 4
* how many bits the tensor cores keep of a sum is not published: ``weight_rounding`` allows for what
  Hopper's are known to lose with fp8, K / 64 times one after the other. Not measured
* torch's product is rounded to 16 bits before it is multiplied with the scales of whole tensors:
  one rounding more, and in float16 it would overflow
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from vllm.compressed_linear.backends.vllm_native.adapter import (
    KernelAdapter,
    add_parameter,
    row_scale,
)
from vllm.compressed_linear.backends.vllm_native.classes import fp4
from vllm.compressed_linear.backends.vllm_native.fp4 import NVFP4_GROUP, unsigned
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.activation import quantize_dequantize
from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import E2M1, torch_dtype

ACTIVATION = ActivationSpec(
    E2M1, True, "group", group_size=NVFP4_GROUP, scale_dtype="float8_e4m3fn", maximum=6.0
)
"""How vLLM quantizes x."""

_MULTIPLE = 32
_IMPRECISION = 2.0**-20
"""Of a scale that went through three approximated reciprocals, each a unit of fp32 off."""


@dataclass(frozen=True, kw_only=True)
class CutlassNvFp4(KernelAdapter):
    """``CutlassNvFp4LinearKernel``."""

    arithmetic: str = "fp4"
    family = "nvfp4"
    scale_dtypes = frozenset({"float8_e4m3fn"})
    row_scale = True

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        if d.group_size != NVFP4_GROUP:
            yield f"groups of {d.group_size} (supported: {NVFP4_GROUP})"
        if d.weight.row_scale is None:
            yield "scales without a second level"
        if d.activation is None:
            yield "it quantizes x, which the descriptor does not"
        elif d.activation != ACTIVATION:
            yield f"x as {d.activation} (supported: {ACTIVATION})"

    def config(self, d: CompressedLinearDescriptor) -> object:
        return fp4.nvfp4_config()

    def build(self, kernel: Any, d: CompressedLinearDescriptor) -> Any:
        return kernel(self.config(d))

    def attributes(self, d: CompressedLinearDescriptor) -> dict[str, Any]:
        return {"output_size_per_partition": d.n, "input_size_per_partition": d.k}

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        given = weights.input_scale
        if given is None or not bool(given > 0):
            raise ValueError(
                f"vllm_native: the static scale of x is {None if given is None else float(given)}, "
                f"expected a positive number ({self.kernel}, {d})"
            )
        codes, scale = unsigned(d, weights)
        layer = torch.nn.Module()
        add_parameter(layer, "weight", codes)
        add_parameter(layer, "weight_scale", scale)
        add_parameter(layer, "input_global_scale_inv", 1 / given[0])
        add_parameter(layer, "alpha", given[0] * row_scale(weights).abs().max())
        return layer

    def prepared_bytes(self, d: CompressedLinearDescriptor) -> int:
        return d.n * d.k // 2 + d.n * d.groups

    def weight_rounding(self, d: CompressedLinearDescriptor) -> float:
        # Second-level scales of rows, rounded to 16 bits, are one rounding more of the result.
        rows = torch.finfo(torch_dtype(d.input_dtype)).eps
        return float((d.k / 64) ** 0.5 * 2.0**-13 + rows)


@dataclass(frozen=True, kw_only=True)
class TorchNvFp4(CutlassNvFp4):
    """``TorchNvFp4LinearKernel``: the same tensors for ``torch._scaled_mm``."""

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        yield from super().reasons(d)
        if d.input_dtype != "bfloat16":
            yield (
                f"{d.input_dtype} activations (supported: bfloat16; it rounds sums to that before "
                "they are scaled)"
            )

    def attributes(self, d: CompressedLinearDescriptor) -> dict[str, Any]:
        return {**super().attributes(d), "weights_padding_cols": -d.k % _MULTIPLE // 2}

    def weight_rounding(self, d: CompressedLinearDescriptor) -> float:
        rounded = torch.finfo(torch_dtype(d.input_dtype)).eps / 2
        return super().weight_rounding(d) + rounded


def slack(
    x: torch.Tensor, input_scale: torch.Tensor | None, input_zero: torch.Tensor | None = None
) -> torch.Tensor:
    """fp32 [M, k]: largest deviation of the x̂ of vLLM's operator from the definition, for x [M, k].

    ``input_scale`` fp32 [1]. A scale may be rounded from a number that is a little off, and x be
    divided by one that is, either way each.
    """
    exact = quantize_dequantize(x, ACTIVATION, input_scale)
    out = torch.zeros_like(exact)
    assert input_scale is not None
    sides = (1 - _IMPRECISION, 1 + _IMPRECISION)
    for rounded, divided in product(sides, sides):
        # ``nudge`` also multiplies the static scale, under which the scales of groups are rounded.
        nudge = divided / rounded
        other = quantize_dequantize(x, ACTIVATION, input_scale * (rounded / nudge), nudge=nudge)
        out = torch.maximum(out, (other - exact).abs())
    return out


KERNELS = (
    CutlassNvFp4(
        kernel="CutlassNvFp4LinearKernel",
        tag="cutlassnvfp4",
        ops=("_C::scaled_fp4_quant", "_C::cutlass_scaled_fp4_mm"),
    ),
    TorchNvFp4(kernel="TorchNvFp4LinearKernel", tag="torchnvfp4", ops=("_C::scaled_fp4_quant",)),
)
