# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as earlier tools wrote them, made from a present one and loaded into vLLM's model:
the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import checkpoint, checkpoint_reference, checkpoint_tensors
from tests.support.model_loading import loaded, logits
from vllm.compressed_linear.integration.config import NAME
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

CHECKPOINT = "gptqmodel-gptq-w4-g128-sym"


def write(
    directory: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None
) -> None:
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((checkpoint(CHECKPOINT) / "config.json").read_text())
    del config["quantization_config"]
    config |= {"quantization_config": quantization} if quantization else {}
    (directory / "config.json").write_text(json.dumps(config))
    for file in checkpoint(CHECKPOINT).glob("tokenizer*"):
        shutil.copy(file, directory)


def assert_same_logits(directory: Path, **options: Any) -> None:
    reference = checkpoint_reference(CHECKPOINT)
    with loaded(directory, **options) as model:
        ours = logits(model, reference["input_ids"])
    error = torch.log_softmax(ours, -1) - torch.log_softmax(reference["logits"], -1)
    assert float(error.abs().max()) <= 1e-4
    quantized = [e for e in PROCESS_PLAN.entries.values() if "uint4b8" in e.descriptor]
    assert len(quantized) == 8  # qkv, o, gate_up and down of two layers


def in_marlins_layout(codes: str, scales: str) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, repacked by vLLM's packer."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import (
        get_weight_perm,
        marlin_weights,
    )

    out = {}
    for name, tensor in checkpoint_tensors(CHECKPOINT).items():
        module, _, last = name.rpartition(".")
        if last == "qweight":
            shifts = torch.arange(0, 32, 4, dtype=torch.int32)
            plain = ((tensor[:, None] >> shifts[:, None]) & 15).flatten(0, 1)
            packed = marlin_weights(plain, *plain.shape, 4, get_weight_perm(4))
            out[f"{module}.{codes}"] = packed.contiguous()
        elif last == "scales":
            groups, n = tensor.shape
            out[f"{module}.{scales}"] = marlin_permute_scales(tensor, groups * 128, n, 128)
        elif last not in ("qzeros", "g_idx"):
            out[name] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}


@pytest.mark.parametrize(
    ("config", "codes", "scales"),
    [
        ({"quant_method": "gptq", "is_marlin_format": True}, "B", "s"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "B", "s"),
        ({"quant_method": "marlin"}, "B", "s"),
        (
            {"quant_method": "awq", "version": "marlin", "zero_point": False},
            "qweight",
            "scales",
        ),
    ],
)
def test_marlins_layout(config: dict[str, Any], codes: str, scales: str, tmp_path: Path) -> None:
    write(
        tmp_path,
        in_marlins_layout(codes, scales),
        {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, **config},
    )
    assert_same_logits(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "GPTQ", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
        {"quant_method": "gptq", "bits": "4", "group_size": "128", "desc_act": True},
    ],
)
def test_configurations_of_early_autogptq(config: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, checkpoint_tensors(CHECKPOINT), config)
    assert_same_logits(tmp_path)


def test_quantize_config_json_beside_config_json(tmp_path: Path) -> None:
    write(tmp_path, checkpoint_tensors(CHECKPOINT), None)
    own = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False}
    (tmp_path / "quantize_config.json").write_text(json.dumps(own))
    assert_same_logits(tmp_path, quantization=NAME)


def test_an_unquantized_model_opts_in_by_name(tmp_path: Path) -> None:
    tensors = {}
    for name, tensor in checkpoint_tensors(CHECKPOINT).items():
        module, _, last = name.rpartition(".")
        if last == "qweight":
            n, k = tensor.shape[1], tensor.shape[0] * 8
            tensors[f"{module}.weight"] = torch.ones(n, k, dtype=torch.float16)
        elif last not in ("scales", "qzeros", "g_idx"):
            tensors[name] = tensor
    write(tmp_path, tensors, None)
    with loaded(tmp_path, quantization=NAME):
        assert len(PROCESS_PLAN.entries) == 9
        assert not any("uint" in entry.descriptor for entry in PROCESS_PLAN.entries.values())
