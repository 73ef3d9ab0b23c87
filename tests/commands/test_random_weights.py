# SPDX-License-Identifier: Apache-2.0
"""The random weights that ``tune`` measures with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.commands.tune.random_weights import random_weights
from vllm.compressed_linear.prepare.self_check import self_check
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    CompressedLinearDescriptor,
    ScaleSpec,
    TransformSpec,
    WeightSpec,
)
from vllm.compressed_linear.spec.elements import E2M1, E4M3, INT8, torch_dtype, uint
from vllm.compressed_linear.testing import Case, conformance_cases

pytestmark = pytest.mark.usefixtures("only_toys")


@pytest.mark.parametrize("case", conformance_cases()[::5], ids=str)
def test_random_weights_are_what_the_descriptor_says(case: Case) -> None:
    """Held against the checkpoint's rules, which know nothing of channel plans."""
    descriptor = case.build().descriptor
    weights = random_weights(descriptor)
    assert (weights.n, weights.k) == (descriptor.n, descriptor.k)
    rows = weights.rows(0, weights.n)
    assert rows.codes.shape == (descriptor.n, descriptor.k)
    for values, spec in (
        (rows.scale, descriptor.weight.scale),
        (rows.zero, descriptor.weight.zero),
    ):
        assert (values is None) == (spec is None)
        if values is not None and spec is not None:
            assert values.shape == (descriptor.n, descriptor.groups)
            assert values.dtype == torch_dtype(spec.dtype)
    order = descriptor.channel_order
    assert (weights.permutation is None) == (order is None)
    if weights.permutation is not None and order is not None:
        assert bool((weights.permutation < 0).any()) == order.padded
    method = ReferenceBackend(descriptor)
    self_check("made up", method, method.prep_weights_for_execution(weights), weights)
    again = random_weights(descriptor).rows(0, descriptor.n)
    assert torch.equal(again.codes, rows.codes)
    if not (order is not None and order.padded) and descriptor.n > 2:
        assert described_anew(descriptor) == descriptor


def described_anew(descriptor: CompressedLinearDescriptor) -> CompressedLinearDescriptor:
    """What loading would say of random weights for ``descriptor``."""
    context = LayerContext(descriptor.input_dtype, descriptor.output_dtype, descriptor.bias_dtype)
    (part,) = refine(random_weights(descriptor).shards, context)
    return part.descriptor


NVFP4 = WeightSpec(E2M1, ScaleSpec("float8_e4m3fn", "group", 16), row_scale="float32")
MXFP4 = WeightSpec(E2M1, ScaleSpec("e8m0", "group", 32))
FP8 = WeightSpec(E4M3, ScaleSpec("float32", "channel"))
INT4 = WeightSpec(uint(4, 8), ScaleSpec("float16", "group", 32))


@pytest.mark.parametrize(
    ("weight", "input_side"),
    [
        (NVFP4, {}),
        (MXFP4, {}),
        (NVFP4, {"activation": ActivationSpec(E2M1, True, "group", True, 16, "float8_e4m3fn", 6)}),
        (FP8, {"activation": ActivationSpec(E4M3, False, "tensor", maximum=448)}),
        (INT4, {"activation": ActivationSpec(INT8, False, "tensor", symmetric=False)}),
        (INT4, {"activation": ActivationSpec(INT8, True, "token")}),
        (INT4, {"prescale": "float32"}),
        (INT4, {"transform": TransformSpec("hadamard", "input", 64)}),
    ],
    ids=str,
)
def test_random_weights_of_quantized_inputs(weight: WeightSpec, input_side: Any) -> None:
    descriptor = CompressedLinearDescriptor(128, 48, weight, "bfloat16", "bfloat16", **input_side)
    assert described_anew(descriptor) == descriptor
    weights = random_weights(descriptor)
    assert (weights.row_scale is not None) == (weight.row_scale is not None)
    activation = descriptor.activation
    assert (weights.input_scale is not None) == bool(activation and activation.needs_scale)
    assert (weights.input_zero is not None) == bool(activation and activation.needs_zero)
    assert bool(torch.isfinite(weights.dequantize(0, 48)).all())
    assert float(weights.dequantize(0, 48).abs().max()) > 0
