# SPDX-License-Identifier: Apache-2.0
"""What is computed for the activations of layers of compressed-tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.support.described import Described
from tests.support.format_configs import BLOCKS, FLOAT4, FLOAT8, INT4, NVFP4, Q, groups
from tests.support.format_configs import INT8 as CHANNEL8
from vllm.compressed_linear.formats.resolution import Delegated, LayerKind, Unquantized
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import E2M1, E4M3, INT8, uint
from vllm.compressed_linear.spec.scheme import CheckpointScheme

TOKEN = {"strategy": "token", "dynamic": True}
TENSOR = {"strategy": "tensor", "dynamic": False}
NVFP4_INPUTS = {**NVFP4, "dynamic": "local"}


def described_inputs(
    inputs: dict[str, Any], weights: dict[str, Any], form: str
) -> CheckpointScheme | Delegated:
    config = groups((["Linear"], weights), format=form)
    config["config_groups"]["group_0"]["input_activations"] = inputs
    found = Described.of(config).resolve(Q)
    assert not isinstance(found, Unquantized)
    return found


MXFP4 = {**FLOAT4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
MXFP8 = {**MXFP4, "num_bits": 8}
ABOVE_224 = float(torch.nextafter(torch.tensor(224.0), torch.tensor(math.inf)))


@pytest.mark.parametrize(
    ("form", "weights", "inputs", "expected"),
    [
        ("int-quantized", CHANNEL8, {"num_bits": 8, **TOKEN}, ActivationSpec(INT8, True, "token")),
        (
            "int-quantized",
            CHANNEL8,
            {"num_bits": 8, **TOKEN, "symmetric": False},
            ActivationSpec(INT8, True, "token", False),
        ),
        (
            "int-quantized",
            CHANNEL8,
            {"num_bits": 8, **TENSOR},
            ActivationSpec(INT8, False, "tensor"),
        ),
        (
            "int-quantized",
            CHANNEL8,
            {"num_bits": 8, **TENSOR, "symmetric": False},
            ActivationSpec(INT8, False, "tensor", False),
        ),
        (
            "int-quantized",
            INT4,
            {"num_bits": 8, "strategy": "group", "group_size": 128, "dynamic": True},
            ActivationSpec(INT8, True, "group", group_size=128),
        ),
        (
            "pack-quantized",
            INT4,
            {"num_bits": 4, **TOKEN},
            ActivationSpec(uint(4, 8), True, "token", maximum=7.0),
        ),
        (
            "pack-quantized",
            INT4,
            {**FLOAT8, **TOKEN},
            ActivationSpec(E4M3, True, "token", maximum=448.0),
        ),
        (
            "float-quantized",
            {**FLOAT8, "strategy": "channel"},
            {**FLOAT8, "strategy": "tensor", "dynamic": True},
            ActivationSpec(E4M3, True, "token", maximum=448.0),
        ),
        (
            "float-quantized",
            {**FLOAT8, "strategy": "tensor"},
            {**FLOAT8, **TENSOR},
            ActivationSpec(E4M3, False, "tensor", maximum=448.0),
        ),
        (
            "float-quantized",
            {**FLOAT8, **BLOCKS},
            {**FLOAT8, **TOKEN},
            ActivationSpec(E4M3, True, "group", group_size=128, maximum=448.0),
        ),
        (
            "nvfp4-pack-quantized",
            NVFP4,
            NVFP4_INPUTS,
            ActivationSpec(E2M1, True, "group", True, 16, "float8_e4m3fn", 6.0),
        ),
        (
            "mxfp4-pack-quantized",
            MXFP4,
            {**MXFP4, "dynamic": True},
            ActivationSpec(E2M1, True, "group", True, 32, "e8m0", 3.5),
        ),
        (
            "mxfp8-quantized",
            MXFP8,
            {**MXFP8, "dynamic": True},
            ActivationSpec(E4M3, True, "group", True, 32, "e8m0", ABOVE_224),
        ),
        (
            "mxfp4-pack-quantized",
            MXFP4,
            {**FLOAT8, **TOKEN},
            ActivationSpec(E4M3, True, "token", maximum=448.0),
        ),
        ("float-quantized", {**FLOAT8, "strategy": "channel"}, None, None),
        ("nvfp4-pack-quantized", NVFP4, None, None),
    ],
)
def test_activations_are_what_vllm_computes(
    form: str,
    weights: dict[str, Any],
    inputs: dict[str, Any],
    expected: ActivationSpec | None,
) -> None:
    found = described_inputs(inputs, weights, form)
    assert isinstance(found, CheckpointScheme)
    assert found.activation == expected
    needed = {t.name for t in found.tensors if t.name.startswith("input_") and not t.optional}
    if expected is None or not expected.needs_scale:
        assert not needed
    elif expected.scale_dtype == "float8_e4m3fn":
        assert needed == {"input_global_scale"}
    else:
        assert needed == {"input_scale"} | ({"input_zero_point"} if expected.needs_zero else set())


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({"num_bits": 8, "strategy": "channel"}, "channel"),
        ({"num_bits": 16, **TOKEN}, "int16"),
        ({**FLOAT4, "strategy": "tensor"}, "float4"),
        ({**FLOAT8, **TENSOR, "symmetric": False}, "asymmetric"),
    ],
)
def test_inputs_that_are_not_known_are_left_to_vllm(inputs: dict[str, Any], word: str) -> None:
    found = described_inputs(inputs, CHANNEL8, "int-quantized")
    assert isinstance(found, Delegated)
    assert word in found.reason


def test_nothing_is_multiplied_with_a_table() -> None:
    config = groups((["Embedding"], INT4))
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, **TOKEN}
    found = Described.of(config).resolve("model.embed_tokens", LayerKind.EMBEDDING)
    assert isinstance(found, CheckpointScheme)
    assert found.activation is None
