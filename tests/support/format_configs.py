# SPDX-License-Identifier: Apache-2.0
"""Configurations of each format, and what they say of a module."""

from __future__ import annotations

from typing import Any

from tests.support.described import Described
from vllm.compressed_linear.formats.resolution import LayerKind, Resolution, Unquantized
from vllm.compressed_linear.spec.scheme import CheckpointScheme

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128}
INT4 = {"num_bits": 4, "group_size": 128, "strategy": "group"}
INT8 = {"num_bits": 8, "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float"}
FLOAT4 = {"num_bits": 4, "type": "float"}
BLOCKS = {"strategy": "block", "block_structure": [128, 128]}
NVFP4 = {
    **FLOAT4,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}
Q = "model.layers.1.self_attn.q_proj"


def resolve(
    config: dict[str, Any], module: str = Q, kind: LayerKind = LayerKind.LINEAR
) -> Resolution:
    return Described.of(config).resolve(module, kind)


def bits_and_group(resolution: Resolution) -> tuple[int, int] | None:
    """What a scheme says; None for an unquantized module."""
    if isinstance(resolution, Unquantized):
        return None
    assert isinstance(resolution, CheckpointScheme)
    assert resolution.weight.scale is not None
    return resolution.weight.element.bits, resolution.weight.scale.group_size


def groups(*entries: tuple[list[str], dict[str, Any]], **other: Any) -> dict[str, Any]:
    """A configuration with one group for each (targets, weights)."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            f"group_{i}": {"targets": targets, "weights": weights}
            for i, (targets, weights) in enumerate(entries)
        },
        **other,
    }


PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    """As ModelOpt has it in config.json."""
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": ["lm_head"],
        "producer": PRODUCER,
        **more,
    }


def compressed_fp8(weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """compressed-tensors with weights and inputs of 8-bit floats."""
    group = {
        "targets": ["Linear"],
        "weights": FLOAT8 | weights,
        "input_activations": FLOAT8 | inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def auto_round(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "auto-round", "sym": True, **settings}


def as_a_part(name: str) -> str:
    """The renaming of a model whose language model is a part of it."""
    return f"language_model.{name}" if name.startswith("model.") else name
