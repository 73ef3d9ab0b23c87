# SPDX-License-Identifier: Apache-2.0
"""fp8 weights and activations through ``torch._scaled_mm``: what vLLM takes where its CUTLASS
products were not built.

What the classes do not say, found by reading vLLM 0.32:

* the one for scales of channels cuts the scale of x to one for each token, and fails where there is
  one for all: x with one scale is for the other class
* the one for tensors knows one scale of the weight. Descriptors have one for each output channel,
  as fused layers do: the largest goes to the kernel, what remains of each row is multiplied with
  the result, which is therefore asked for in fp32
* fewer than 17 tokens are padded with rows of uninitialized memory, which are cut off again
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vllm.compressed_linear.backends.vllm_native.adapter import add_parameter, row_ratio, scales
from vllm.compressed_linear.backends.vllm_native.scaled_mm import Fp8
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor

_OPS = (
    "_C::dynamic_scaled_fp8_quant",
    "_C::dynamic_per_token_scaled_fp8_quant",
    "_C::static_scaled_fp8_quant",
)


@dataclass(frozen=True, kw_only=True)
class ChannelWiseTorchFp8(Fp8):
    """``ChannelWiseTorchFP8ScaledMMLinearKernel``."""

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        yield from super().reasons(d)
        if d.activation is not None and d.activation.granularity == "tensor":
            yield f"x as {d.activation.kind}: it reads a scale for each token, and there is one"


@dataclass(frozen=True, kw_only=True)
class PerTensorTorchFp8(Fp8):
    """``PerTensorTorchFP8ScaledMMLinearKernel``."""

    scales_of: str = "tensor"

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        layer = super().layer(d, weights)
        add_parameter(layer, "weight_scale", self._scales(d, weights).abs().max())
        return layer

    def result_dtype(self, d: CompressedLinearDescriptor) -> torch.dtype:
        return torch.float32

    def ratio(
        self, d: CompressedLinearDescriptor, weights: CompressedWeights
    ) -> torch.Tensor | None:
        return row_ratio(scales(d, weights).to(torch.float32).flatten())


KERNELS = (
    PerTensorTorchFp8(
        kernel="PerTensorTorchFP8ScaledMMLinearKernel", tag="torchtensorfp8", ops=_OPS
    ),
    ChannelWiseTorchFp8(
        kernel="ChannelWiseTorchFP8ScaledMMLinearKernel", tag="torchchannelfp8", ops=_OPS
    ),
)
