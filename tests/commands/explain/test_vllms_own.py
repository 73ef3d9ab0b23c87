# SPDX-License-Identifier: Apache-2.0
"""What ``explain`` says of layers that vLLM's own code runs, and of what it refuses."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import checkpoint
from tests.support.explained import explained
from tests.support.messages import says
from tests.support.sparse_checkpoints import (
    deepseek_config,
    deepseek_tensors,
    llama_config,
    llama_tensors,
    plain,
    write_sparse,
)
from vllm.compressed_linear.commands.explain import meta_model
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.machine.platform import Platform

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "vocab_size": 512,
}


def mixture(path: Path, linear: Any = None) -> dict[str, Any]:
    """A small mixture; ``linear``: tensors of a projection of an expert, if not packed ones."""
    config = deepseek_config(2, 8, **SMALL)
    tensors = deepseek_tensors(config) if linear is None else deepseek_tensors(config, linear)
    if linear is not None:
        del config["quantization_config"]
    write_sparse(path, config, tensors, 2)
    return tensors


@pytest.mark.parametrize("quantized", [True, False])
def test_experts_are_there_with_their_bytes(quantized: bool, tmp_path: Path) -> None:
    mixture(tmp_path, None if quantized else plain)
    found = explained(tmp_path)
    (experts,) = [left for left in found.left if left.name.endswith("experts")]
    weights = 8 * 3 * 128 * 256
    codes = weights // 2 + weights // 32 * 2 + 8 * 3 * 2 * 8  # codes, scales, shapes
    assert experts.nbytes == (codes if quantized else weights * 2)
    assert experts.name == "model.layers.1.mlp.experts"
    if not quantized:
        assert "does not quantize" in experts.reason


def test_every_byte_of_the_files_is_somebodys(tmp_path: Path) -> None:
    tensors = mixture(tmp_path)
    runs = explained(tmp_path).to_json()["runs"]
    held = Counter()
    for name, entry in runs.items():
        held[entry["by"]] += entry["nbytes"]
        assert entry["with"] or entry["reason"], name
    assert runs["model.layers.0.mlp.down_proj"]["by"] == "compressed_linear"
    assert runs["model.layers.1.mlp.experts"]["by"] == "vllm"
    assert runs["model.layers.1.input_layernorm"]["by"] == "vllm"
    bias = 8 * 4  # of the router, a parameter of its module
    total = sum(e["nbytes"] for e in runs.values())
    assert abs(total - explained(tmp_path).file_bytes) <= bias, (len(tensors), held)


def test_reasons_are_the_real_ones(tmp_path: Path) -> None:
    mixture(tmp_path)
    reasons = {left.name: left.reason for left in explained(tmp_path).left}
    assert "reads its weight itself" in reasons["model.layers.0.self_attn.kv_b_proj"]
    assert "without a quantization config" in reasons["model.layers.1.mlp.gate"]
    assert "only looked up" in reasons["model.embed_tokens"]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_refusal_of_what_is_left_to_vllm_is_an_error(tp: int, tmp_path: Path) -> None:
    name = "llmcompressor-nvfp4"
    shutil.copytree(checkpoint(name), tmp_path / name)
    config = json.loads((checkpoint(name) / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"]["symmetric"] = False
    (tmp_path / name / "config.json").unlink()
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    found = explained(tmp_path / name, tp_size=tp)
    (error,) = found.errors
    assert says(error, "model.layers.{0-1}.self_attn.qkv_proj", "NVFP4")
    methods = {left.name: left.method for left in found.left}
    assert methods["lm_head"]


def test_a_method_that_vllm_does_not_know_is_an_error_here_only() -> None:
    path = checkpoint("hqq-w4-g64")
    (error,) = explained(path).errors
    assert says(error, "hqq")
    elsewhere = explain(str(path), platform=Platform.parse("cuda:90"))
    assert not elsewhere.errors
    assert any("not asked here" in note for note in elsewhere.notes)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_module_that_cannot_be_imported_is_an_error(
    tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(architectures: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setattr(meta_model, "inspect_models_here", refuse)
    found = explained("gptqmodel-gptq-w4-g128-sym", tp_size=tp)
    (error,) = found.errors
    assert says(error, "torchvision")
    assert found.layers  # what the files hold is shown all the same


def test_what_only_fails_without_weights_is_not_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(config: Any) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(meta_model, "_construct", fail)
    found = explained("gptqmodel-gptq-w4-g128-sym")
    assert not found.errors
    assert any("whether it loads is not known" in note for note in found.notes)


class Moving(torch.nn.Module):
    """Does while it is built what vLLM's class of Kimi K2.5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = torch.nn.Linear(4, 2)
        self.tower = self.tower.to(device=torch.device("cpu"), dtype=torch.float16)
        self.projector = torch.nn.Linear(2, 2).to("cpu").cpu()
        self.scale = torch.ones(2).to(self.projector.weight)


def test_a_class_that_moves_its_modules_is_built_without_weights() -> None:
    with torch.device("meta"), meta_model.StayOnMeta():
        model = Moving()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.tower.weight.dtype == torch.float16
    assert model.projector.weight.dtype == torch.float32
    real = torch.ones(2)
    with meta_model.StayOnMeta():
        assert real.to(torch.float64).dtype == torch.float64
    with torch.device("meta"), pytest.raises(NotImplementedError, match="meta"):
        Moving()


def test_a_gpu_is_not_blamed_for_what_this_machine_refuses(tmp_path: Path) -> None:
    mixture(tmp_path)
    found = explain(str(tmp_path), platform=Platform.parse("cuda:90"))
    assert not found.errors
    assert not any(left.refusal for left in found.left)


def test_layers_that_contradict_the_configuration_are_all_named(tmp_path: Path) -> None:
    tensors = llama_tensors(256, 512, 128, 2, 512)
    for name in list(tensors):
        if name.endswith("down_proj.qweight"):
            tensors[name] = ("I32", [1, 1])
    config = llama_config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    write_sparse(tmp_path, config, tensors, 1)
    found = explained(tmp_path)
    assert [says(error, "down_proj.qweight") for error in found.errors] == [True, True]
    assert len(found.layers) == 2 * 3 + 1
