# SPDX-License-Identifier: Apache-2.0
"""Weights that vLLM's latent attention (MLA) takes from a layer to multiply them into others.

It gets them as the layer's output for the unit matrix. If the layer quantizes x, a 1 becomes some
other number, by a few percent under a static scale. So each channel gets a value of which it is
known what it becomes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from vllm.compressed_linear.integration.compat_weights import rebind
from vllm.compressed_linear.integration.linear import CompressedLinearMethod
from vllm.compressed_linear.spec.activation import prepare_input


@cache
def take_exact_weights() -> None:
    """Let vLLM's function for such weights do so for our layers."""
    from vllm.model_executor.layers.quantization.utils import quant_utils

    if hasattr(quant_utils, "get_and_maybe_dequant_weights"):
        rebind(quant_utils, "get_and_maybe_dequant_weights", _weights, quant_utils)


def _weights(
    original: Callable[..., torch.Tensor], layer: Any, out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[N, K] of ``out_dtype``, prescales of x included."""
    inner = layer
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    method = getattr(inner, "quant_method", None)
    if not isinstance(method, CompressedLinearMethod):
        return original(layer, out_dtype=out_dtype)
    scheme = method.only_scheme
    if scheme is None or scheme.activation is None or scheme.transform is not None:
        return original(layer, out_dtype=out_dtype)
    numbers = method.input_numbers[0]
    k = inner.input_size_per_partition
    # A static scale fits the values of x that occur, of which 1 may not be one.
    value = torch.ones(k) if numbers.scale is None else numbers.scale.cpu().expand(k)
    if scheme.activation.dynamic and numbers.scale is not None:
        value = value * scheme.activation.maximum
    if numbers.prescale is not None:
        prescale = numbers.prescale.cpu()
        value = value / torch.where(prescale == 0, 1, prescale)
    x = torch.diag(value).to(method.params_dtype)
    became = prepare_input(
        x,
        scheme.activation,
        prescale=numbers.prescale,
        input_scale=numbers.scale,
        input_zero=numbers.zero,
    ).diagonal()
    out = method.apply(inner, x.to(inner.weight_packed.device), None).to(torch.float32)
    factor = torch.where(became == 0, 1, became)
    if numbers.prescale is not None:
        factor = factor / numbers.prescale.cpu()
    return (out / factor.unsqueeze(1).to(out.device)).t().to(out_dtype)
