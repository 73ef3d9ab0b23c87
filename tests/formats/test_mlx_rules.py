# SPDX-License-Identifier: Apache-2.0
"""What MLX's configuration says of a module, and which configurations are taken for MLX's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.described import Described
from tests.support.format_configs import AWQ, GPTQ, Q, bits_and_group, resolve
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.base import mlx_configuration, quant_method_of
from vllm.compressed_linear.formats.registry import format_of
from vllm.compressed_linear.formats.resolution import ConfigError, LayerKind
from vllm.compressed_linear.spec.scheme import CheckpointScheme

MLX: dict[str, Any] = {"group_size": 128, "bits": 4}


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ({}, (4, 64)),
        ({"bits": 8}, (8, 64)),
        ({"bits": 6, "group_size": 32}, (6, 32)),
        ({"bits": 3, "group_size": None}, (3, 64)),
        ({"mode": "mxfp4"}, (4, 32)),
        ({"mode": "nvfp4", "bits": 4, "group_size": None}, (4, 16)),
    ],
)
def test_what_an_entry_leaves_out_is_the_librarys_default(
    override: dict[str, Any], found: tuple[int, int]
) -> None:
    assert bits_and_group(resolve(MLX | {Q: override})) == found
    assert bits_and_group(resolve(MLX | {Q: override}, "model.layers.0.mlp.up_proj")) == (4, 128)


@pytest.mark.parametrize("kind", list(LayerKind))
def test_tables_and_heads_are_quantized_too(kind: LayerKind) -> None:
    assert bits_and_group(resolve(MLX, "model.embed_tokens", kind)) == (4, 128)


def test_affine_weights_have_addends_and_floats_have_none() -> None:
    affine, floats = resolve(MLX), resolve(MLX | {"mode": "nvfp4", "group_size": 16})
    assert isinstance(affine, CheckpointScheme)
    assert isinstance(floats, CheckpointScheme)
    assert [t.name for t in affine.tensors] == ["weight", "scales", "biases"]
    assert [t.name for t in floats.tensors] == ["weight", "scales"]
    assert affine.weight.zero is not None
    assert floats.weight.zero is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "quantization.bits is 7, expected one of 2, 3, 4, 5, 6, 8"),
        ({"mode": "nf4"}, "quantization.mode is 'nf4', expected one of affine, mxfp4"),
        ({"group_size": 0}, "quantization.group_size is 0, expected a positive number"),
        ({Q: {"bits": 1}}, f"quantization.{Q}.bits is 1, expected"),
    ],
)
def test_what_mlx_does_not_have_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        resolve(MLX | change)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (MLX, "mlx"),
        (MLX | {"mode": "affine", "quant_method": ""}, "mlx"),
        (MLX | {"model.layers.0.mlp.gate": {"bits": 8}, "lm_head": False}, "mlx"),
        (MLX | {"desc_act": False, "sym": True}, ""),  # of early AutoGPTQ
        (MLX | {"zero_point": True, "version": "GEMM"}, ""),
        ({"w_bit": 4, "q_group_size": 128}, ""),
        ({"bits": 4}, ""),
        (GPTQ, "gptq"),
        (AWQ, "awq"),
    ],
)
def test_a_configuration_without_method_is_told_by_its_fields(
    config: dict[str, Any], method: str
) -> None:
    assert quant_method_of(config) == method
    assert (format_of(config) is not None) == bool(method)


def test_early_files_have_the_configuration_under_another_name_only() -> None:
    assert mlx_configuration({"quantization": MLX}) == MLX
    assert mlx_configuration({"quantization": GPTQ}) is None
    assert mlx_configuration({}) is None


def test_an_order_of_convolutions_that_comes_with_other_norms_is_refused() -> None:
    conv = "model.layers.0.linear_attn.conv1d.weight"
    headers = Headers(
        {
            conv: TensorHeader("bfloat16", (64, 4, 1), 512, "model.safetensors"),
            f"{Q}.scales": TensorHeader("bfloat16", (64, 2), 256, "model.safetensors"),
        }
    )
    with pytest.raises(ConfigError, match="MLX's order of a convolution"):
        Described.of(MLX, headers)
