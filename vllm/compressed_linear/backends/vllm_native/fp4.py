# SPDX-License-Identifier: Apache-2.0
"""NVFP4, MXFP4 and MXFP8 weights under activations of 16 bits: vLLM's Marlin.

What the classes do not say, found by reading vLLM 0.32:

* NVFP4: scales of groups become numbers without a sign and with five bits of exponent; what is
  below 2⁻⁶ of the layer's largest power of two becomes 0. Such weights stop the load
* there is one second-level scale for the layer. Where rows differ (fused layers), the largest goes
  to the kernel and what remains of each row is multiplied with the result
* MX scales are read with bf16 activations only
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
    packed_codes,
    row_scale,
    scales,
)
from vllm.compressed_linear.backends.vllm_native.classes import fp4, process
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.spec.packing import Packing, pack

NVFP4_GROUP, MX_GROUP = 16, 32


def unsigned(
    d: CompressedLinearDescriptor, weights: CompressedWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 weights for kernels whose scales have no sign: codes uint8 [N, K/2], the first in the
    lower half, and scales e4m3 [N, G], none negative."""
    scale = scales(d, weights).to(torch.float32)
    # The sign of a code is its highest bit.
    flipped = (scale < 0).repeat_interleave(NVFP4_GROUP, 1).to(torch.uint8) << 3
    codes = pack(byte_codes(d, weights) ^ flipped, Packing(4, "K"))
    return codes.view(torch.uint8), scale.abs().to(torch.float8_e4m3fn)


@dataclass(frozen=True, kw_only=True)
class _Marlin(KernelAdapter):
    """What the three have in common. ``group``: input channels that share a scale."""

    group: int
    ops: tuple[str, ...] = ("_C::gptq_marlin_repack", "_C::marlin_gemm")
    arithmetic: str = "mma"
    efficiency: float = 0.65

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        if d.group_size != self.group:
            yield f"groups of {d.group_size} (supported: {self.group})"

    def build(self, kernel: Any, d: CompressedLinearDescriptor) -> Any:
        return kernel(self.config(d))

    def attributes(self, d: CompressedLinearDescriptor) -> dict[str, Any]:
        return {
            "output_size_per_partition": d.n,
            "input_size_per_partition": d.k,
            "params_dtype": torch_dtype(d.input_dtype),
        }

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        layer = torch.nn.Module()
        add_parameter(layer, "weight", packed_codes(d, weights).view(torch.uint8))
        add_parameter(layer, "weight_scale", scales(d, weights))
        return layer

    def prepared_bytes(self, d: CompressedLinearDescriptor) -> int:
        return d.n * d.k * d.weight.element.bits // 8 + d.n * d.groups

    def weight_rounding(self, d: CompressedLinearDescriptor) -> float:
        # Codes times scales are exact in 16 bits but for the largest and the smallest of them; a
        # second-level scale of rows is one rounding more of the result.
        return float(torch.finfo(torch_dtype(d.input_dtype)).eps)


@dataclass(frozen=True, kw_only=True)
class MarlinNvFp4(_Marlin):
    """``MarlinNvFp4LinearKernel``."""

    group: int = NVFP4_GROUP
    family = "nvfp4"
    scale_dtypes = frozenset({"float8_e4m3fn"})
    row_scale = True

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        yield from super().reasons(d)
        if d.weight.row_scale is None:
            yield "scales without a second level"
        if d.activation is not None:
            yield f"x as {d.activation.kind}: it takes x as it is, which the descriptor does not"

    def config(self, d: CompressedLinearDescriptor) -> object:
        return fp4.nvfp4_config()

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        codes, scale = unsigned(d, weights)
        self._check_scales(d, scale.to(torch.float32))
        layer = torch.nn.Module()
        add_parameter(layer, "weight", codes)
        add_parameter(layer, "weight_scale", scale)
        add_parameter(layer, "weight_global_scale", row_scale(weights).abs().max())
        return layer

    @staticmethod
    def _check_scales(d: CompressedLinearDescriptor, scale: torch.Tensor) -> None:
        """``ValueError`` where the kernel would take a ``scale``, none negative, for 0."""
        largest = float(scale.max())
        lift = 1.0
        if d.input_dtype == "bfloat16" and 0 < largest < 448:
            lift = 2.0 ** int(torch.tensor(448 / largest).log2().floor())
        small = (scale > 0) & (scale * lift < 2.0**-6)
        if bool(small.any()):
            raise ValueError(
                f"vllm_native: {int(small.sum())} group scales that vLLM's Marlin would take for "
                f"0, since they are so much smaller than the largest, {largest:g} ({d}); choose "
                "another backend for this layer"
            )


@dataclass(frozen=True, kw_only=True)
class MarlinMxFp4(_Marlin):
    """``MarlinMxFp4LinearKernel``."""

    group: int = MX_GROUP
    family = "mxfp4"
    scale_dtypes = frozenset({"e8m0"})

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        yield from super().reasons(d)
        yield from _mx_reasons(d)

    def config(self, d: CompressedLinearDescriptor) -> object:
        return fp4.mxfp4_config()


@dataclass(frozen=True, kw_only=True)
class MarlinMxfp8(_Marlin):
    """``MarlinMxfp8LinearKernel``."""

    group: int = MX_GROUP
    family = "mxfp8"
    scale_dtypes = frozenset({"e8m0"})

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        yield from super().reasons(d)
        yield from _mx_reasons(d)

    def config(self, d: CompressedLinearDescriptor) -> object:
        return fp4.mxfp8_config(d.n, d.k)

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        layer = torch.nn.Module()
        add_parameter(layer, "weight", byte_codes(d, weights).view(torch.float8_e4m3fn))
        add_parameter(layer, "weight_scale", scales(d, weights))
        return layer

    def repack(self, kernel: Any, layer: torch.nn.Module, d: CompressedLinearDescriptor) -> None:
        with process.default_dtype(torch_dtype(d.input_dtype)):
            super().repack(kernel, layer, d)


def _mx_reasons(d: CompressedLinearDescriptor) -> Iterable[str]:
    if d.input_dtype != "bfloat16":
        yield f"e8m0 scales with {d.input_dtype} activations (supported: bfloat16)"
    if d.activation is not None:
        yield f"x as {d.activation.kind}: it takes x as it is, which the descriptor does not"


KERNELS = (
    MarlinNvFp4(kernel="MarlinNvFp4LinearKernel", tag="marlinnvfp4"),
    MarlinMxFp4(kernel="MarlinMxFp4LinearKernel", tag="marlinmxfp4"),
    MarlinMxfp8(kernel="MarlinMxfp8LinearKernel", tag="marlinmxfp8"),
)
