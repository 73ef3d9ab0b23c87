# SPDX-License-Identifier: Apache-2.0
"""Quantization of a layer's output, after any product."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping

import torch

from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.activation import quantize_dequantize
from vllm.compressed_linear.spec.descriptor import ActivationSpec

SCALE, ZERO = "output_scale", "output_zero"
"""Names of the tensors: fp32 [1], and int32 [1] for specs that are not symmetric."""


@torch.library.custom_op("compressed_linear::quantize_output", mutates_args=())
def quantize_output(
    y: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """y [M, N] quantized and dequantized in fp32, in its dtype. ``activation``: JSON of a spec.

    An op because compilers may not use IEEE division."""
    wide = quantize_dequantize(y.to(torch.float32), _spec(activation), scale, zero)
    # A copy even of nothing: what an op returns must not be its argument.
    return torch.empty_like(y).copy_(wide)


@functools.cache
def _spec(text: str) -> ActivationSpec:
    return ActivationSpec.from_json(json.loads(text))


@quantize_output.register_fake
def _(
    y: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, activation: str
) -> torch.Tensor:
    return torch.empty_like(y)


def output_tensors(spec: ActivationSpec, weights: CompressedWeights) -> dict[str, torch.Tensor]:
    """The numbers of ``spec`` that ``weights`` has."""
    found = {SCALE: weights.output_scale, ZERO: weights.output_zero if spec.needs_zero else None}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def with_output(
    y: torch.Tensor, activation: str, tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """y [..., N], quantized. ``activation``: JSON of a spec, made before compilers trace this; ""
    for y as it is."""
    if not activation:
        return y
    flat = y.reshape(-1, y.shape[-1])
    out: torch.Tensor = torch.ops.compressed_linear.quantize_output(
        flat, tensors[SCALE], tensors.get(ZERO), activation
    )
    return out.reshape(y.shape)


def output_text(spec: ActivationSpec | None) -> str:
    """The argument ``activation`` of ``with_output``."""
    return "" if spec is None else spec.text
