# SPDX-License-Identifier: Apache-2.0
"""fp8 weights under activations of 16 bits: vLLM's Marlin for fp8.

The kernel leaves the exponent's bias of a dequantized weight to the scale, which vLLM multiplies
with 2^120 (bf16) or 2^8 (fp16) beforehand: that must not overflow, and small scales must be fp16
already. It knows one scale for each output channel, or one for each 128 input channels of it.
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
    cast_scales,
    scales,
)
from vllm.compressed_linear.backends.vllm_native.classes import scaled_mm
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype

GROUP = 128
_LARGEST = {"bfloat16": 2.0**120, "float16": 2.0**8}


@dataclass(frozen=True, kw_only=True)
class MarlinFp8(KernelAdapter):
    """``MarlinFP8ScaledMMLinearKernel`` where x is not quantized."""

    family = "fp8 weights"

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        scale = d.weight.scale
        if scale is None:
            yield "weights without scales"
        elif d.input_dtype == "float16" and scale.dtype != "float16":
            yield f"scale dtype {scale.dtype} with float16 activations (supported: float16)"
        if d.group_size not in (d.k, GROUP):
            yield f"groups of {d.group_size} (supported: {GROUP}, or one of each output channel)"
        if d.k % 4:
            yield f"K={d.k} codes do not fill containers of 32 bits"

    def config(self, d: CompressedLinearDescriptor) -> object:
        return scaled_mm.fp8_config(
            d.n, d.k, torch_dtype(d.input_dtype), weight="channel", activation="dynamic tensor"
        )

    def build(self, kernel: Any, d: CompressedLinearDescriptor) -> Any:
        return kernel(self.config(d), layer_param_names=scaled_mm.FP8_NAMES)

    def attributes(self, d: CompressedLinearDescriptor) -> dict[str, Any]:
        return {
            "output_size_per_partition": d.n,
            "input_size_per_partition": d.k,
            "logical_widths": [d.n],
            "orig_dtype": torch_dtype(d.input_dtype),
            # Of one row each: the standard layout has scales for every row.
            "weight_block_size": None if d.group_size == d.k else [1, d.group_size],
        }

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        layer = torch.nn.Module()
        codes = byte_codes(d, weights).view(torch.float8_e4m3fn)
        add_parameter(layer, "weight", codes.t())
        scale = cast_scales(d, scales(d, weights), _LARGEST[d.input_dtype])
        add_parameter(layer, "weight_scale", scale.t().contiguous())
        return layer

    def prepared_bytes(self, d: CompressedLinearDescriptor) -> int:
        return d.n * d.k + d.n * d.groups * torch_dtype(d.input_dtype).itemsize


KERNELS = (
    MarlinFp8(
        kernel="MarlinFP8ScaledMMLinearKernel",
        tag="marlinfp8",
        ops=("_C::gptq_marlin_repack", "_C::marlin_gemm"),
        arithmetic="mma",
        efficiency=0.65,
    ),
)
