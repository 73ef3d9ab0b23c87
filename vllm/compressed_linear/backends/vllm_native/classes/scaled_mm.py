# SPDX-License-Identifier: Apache-2.0
"""vLLM's classes for weights and activations of 8 bits: how they are configured."""

from __future__ import annotations

from typing import Any

import torch

FP8_NAMES = ["weight", "weight_scale", "input_scale", "input_scale_ub"]
"""Parameter names for fp8 classes."""

INT8_NAMES = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
"""The same for int8."""


def int8_config(*, static: bool, symmetric: bool) -> object:
    """vLLM's ``Int8ScaledMMLinearLayerConfig`` for a weight with a scale for each channel."""
    from vllm.model_executor.kernels.linear.scaled_mm import Int8ScaledMMLinearLayerConfig

    return Int8ScaledMMLinearLayerConfig(
        is_static_input_scheme=static, is_channelwise=True, input_symmetric=symmetric
    )


def fp8_config(
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    weight: str,
    activation: str,
    out_dtype: torch.dtype | None = None,
) -> object:
    """vLLM's ``FP8ScaledMMLinearLayerConfig`` for a weight [n, k] and x of ``dtype``.

    ``weight``: what shares its scales, "tensor", "channel" or "block" of 128×128; ``activation``:
    "static tensor", "dynamic tensor", "dynamic token" or "dynamic group" of 128; ``out_dtype``: of
    the result, that of x if it is None.
    """
    from vllm.model_executor.kernels.linear import FP8ScaledMMLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    weights = {
        "tensor": keys.kFp8StaticTensorSym,
        "channel": keys.kFp8StaticChannelSym,
        "block": keys.kFp8Static128BlockSym,
    }
    activations = {
        "static tensor": keys.kFp8StaticTensorSym,
        "dynamic tensor": keys.kFp8DynamicTensorSym,
        "dynamic token": keys.kFp8DynamicTokenSym,
        "dynamic group": keys.kFp8Dynamic128Sym,
    }
    return FP8ScaledMMLinearLayerConfig(
        weight_quant_key=weights[weight],
        activation_quant_key=activations[activation],
        weight_shape=(n, k),
        input_dtype=dtype,
        out_dtype=out_dtype or dtype,
    )


def quantize_without_compiler(kernel: Any) -> None:
    """Make a kernel object quantize x by vLLM's compiled operator and not by the Python code that
    vLLM leaves to its compiler: inside an operator of ours no compiler sees it."""
    quantizer = getattr(kernel, "quant_fp8", None)
    if quantizer is not None:
        quantizer._forward_method = quantizer.forward_cuda
