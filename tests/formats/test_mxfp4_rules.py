# SPDX-License-Identifier: Apache-2.0
"""``quant_method: mxfp4`` of gpt-oss: linear layers are plain, experts are vLLM's."""

from __future__ import annotations

import pytest

from tests.support.described import Described
from tests.support.format_configs import Q, resolve
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.compressed_tensors import CompressedTensors
from vllm.compressed_linear.formats.mxfp4 import Mxfp4
from vllm.compressed_linear.formats.registry import format_of, parse
from vllm.compressed_linear.formats.resolution import Delegated, LayerKind, Unquantized
from vllm.compressed_linear.spec.scheme import CheckpointScheme

MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}
EXPERTS = "model.layers.0.mlp.experts"


def headers(**tensors: tuple[str, tuple[int, ...]]) -> Headers:
    return Headers(
        {
            name.replace("__", "."): TensorHeader(dtype, shape, 1, "model.safetensors")
            for name, (dtype, shape) in tensors.items()
        }
    )


@pytest.mark.parametrize("method", ["mxfp4", "gpt_oss_mxfp4"])
def test_linear_layers_are_plain_and_experts_are_vllms(method: str) -> None:
    config = MXFP4 | {"quant_method": method}
    assert format_of(config) is Mxfp4
    for module in (Q, "model.layers.0.mlp.router"):
        assert isinstance(resolve(config, module), Unquantized)
    assert isinstance(resolve(config, "lm_head", LayerKind.HEAD), Unquantized)
    assert isinstance(resolve(config, f"{EXPERTS}.0.up_proj"), Delegated)
    assert parse(config).delegated()[0] == method


@pytest.mark.parametrize("tensor", ["gate_up_proj_blocks", "w13_weight_scale"])
def test_the_file_says_that_experts_are_quantized(tensor: str) -> None:
    """Under the checkpoint's names and under vLLM's."""
    file = Described.of(MXFP4, headers(**{f"{EXPERTS}.{tensor}": ("uint8", (4, 64, 4, 16))})).file
    assert file.experts_quantized(EXPERTS) is True


def test_codes_of_a_linear_layer_are_read() -> None:
    module = "a.up_proj"
    tensors = {
        f"{module}.weight": ("uint8", (64, 64)),
        f"{module}.weight_scale": ("uint8", (64, 4)),
    }
    found = Described.of(MXFP4, headers(**tensors)).resolve(module)
    assert isinstance(found, CheckpointScheme)
    assert str(found.weight.element) == "e2m1"


def test_what_vllm_renames_stays_compressed_tensors() -> None:
    """Kimi-K3: vLLM gives its configuration the other name."""
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    config = {
        "quant_method": "mxfp4",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    assert format_of(config) is CompressedTensors
