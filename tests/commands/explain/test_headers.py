# SPDX-License-Identifier: Apache-2.0
"""``explain`` of checkpoints that are made for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.explained import explained
from tests.support.messages import says
from tests.support.sparse_checkpoints import (
    GPTQ,
    gptq,
    llama_config,
    llama_tensors,
    write_sparse,
)
from vllm.compressed_linear.checkpoint.headers import read_headers
from vllm.compressed_linear.commands.explain import explain as explain_module
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.explain.layers import model_layers
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.layer import choose


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    write_sparse(tmp_path / "8b", llama_config(), llama_tensors(4096, 14336, 1024, 32, 128256), 4)
    return tmp_path / "8b"


def test_an_8b_checkpoint_is_explained_once_for_equal_layers_and_reads_no_weights(
    llama_8b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    files = list(llama_8b.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 5e9
    assert sum(file.stat().st_blocks for file in files) * 512 < 1e6
    choices: list[str] = []

    def counted(layer: str, *args: Any) -> Any:
        choices.append(layer)
        return choose(layer, *args)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(explain_module, "choose", counted)
    found = explained(llama_8b)
    assert len(found.layers) == 32 * 4 + 1
    assert {layer.partition(".layers.")[2][:1] for layer in choices} == {"0", ""}
    names = [layer.name for layer in found.layers[:4]]
    assert names == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert str(found.layers[2].likely.parts[0].descriptor) == (
        "28672x4096, uint4b8, g128, float16 scale, reordered K, bfloat16 → bfloat16"
    )


def test_weights_that_are_fused_on_disk(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"lm_head.weight": ("F16", [512, 256])}
    for index in range(2):
        tensors |= gptq(f"model.layers.{index}.self_attn.qkv_proj", 512, 256)
        tensors |= gptq(f"model.layers.{index}.self_attn.o_proj", 256, 256)
        tensors |= gptq(f"model.layers.{index}.mlp.gate_up_proj", 1024, 256)
        tensors |= gptq(f"model.layers.{index}.mlp.down_proj", 256, 512)
    config = llama_config(
        architectures=["Phi3ForCausalLM"],
        model_type="phi3",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        pad_token_id=0,
    )
    write_sparse(tmp_path, config, tensors, 1)
    found = explained(tmp_path, tp_size=2)
    assert found.layers[0].name == "model.layers.0.self_attn.qkv_proj"
    descriptor = found.layers[0].likely.parts[0].descriptor
    assert (descriptor.n, descriptor.k) == (256, 256)
    architectures, headers = config["architectures"], read_headers(tmp_path)
    assert headers is not None
    first, _ = model_layers(tmp_path, architectures, tp_size=2, dtype="auto", headers=headers)
    assert [source.n for source in first.layers[0].sources] == [128, 64, 64]


def test_what_vllm_refuses_is_an_error_on_this_machine_only(
    tmp_path: Path, no_int4_experts: None
) -> None:
    tensors: dict[str, Any] = {"lm_head.weight": ("F16", [512, 256])}
    for index in range(2):
        prefix = f"model.layers.{index}"
        for name, n in (("q", 256), ("k", 128), ("v", 128), ("o", 256)):
            tensors |= gptq(f"{prefix}.self_attn.{name}_proj", n, 256)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = ("F16", [4, 256])
        for expert in range(4):
            for name, n, k in (("w1", 512, 256), ("w3", 512, 256), ("w2", 256, 512)):
                tensors |= gptq(f"{prefix}.block_sparse_moe.experts.{expert}.{name}", n, k)
    config = llama_config(
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        quantization_config={**GPTQ, "desc_act": False},
    )
    write_sparse(tmp_path, config, tensors, 1)
    here = explained(tmp_path)
    refused = [left for left in here.left if left.refusal]
    assert [left.name for left in refused] == [
        f"model.layers.{index}.block_sparse_moe.experts" for index in range(2)
    ]
    assert len(here.errors) == 1
    assert "No WNA16 MoE backend" in here.errors[0]
    assert {p.backend for layer in here.layers for p in layer.likely.parts} == {"cpu"}
    elsewhere = explain(str(tmp_path), platform=Platform.parse("cuda:90"))
    assert not elsewhere.errors


def test_a_model_vllm_does_not_know_is_explained_from_headers(tmp_path: Path) -> None:
    tensors = gptq("blocks.0.mixer.in_proj", 512, 256) | gptq("blocks.0.mixer.out_proj", 256, 512)
    config = llama_config(architectures=["NoSuchModel"])
    write_sparse(tmp_path, config, tensors, 1)
    found = explained(tmp_path)
    assert any("headers alone" in note for note in found.notes)
    assert says(found.errors[0], "NoSuchModel", "not supported")
    assert [layer.name for layer in found.layers] == [
        "blocks.0.mixer.in_proj",
        "blocks.0.mixer.out_proj",
    ]
    shapes = [layer.likely.parts[0].descriptor for layer in found.layers]
    assert [(d.n, d.in_features) for d in shapes] == [(512, 256), (256, 512)]
    split = explained(tmp_path, tp_size=2)
    assert split.errors == found.errors
    assert any("not split among 2" in note for note in split.notes)
    assert [layer.name for layer in split.layers] == [layer.name for layer in found.layers]
    elsewhere = explain(str(tmp_path), platform=Platform.parse("cuda:90"))
    assert not elsewhere.errors
    assert any(says(note, "NoSuchModel", "not asked") for note in elsewhere.notes)


def test_layers_without_tensors_are_shown_as_configured_with_an_error(tmp_path: Path) -> None:
    config = llama_config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    tensors = {
        name.replace("down_proj", "wo"): tensor
        for name, tensor in llama_tensors(256, 512, 128, 1, 512).items()
    }
    write_sparse(tmp_path, config, tensors, 1)
    found = explained(tmp_path)
    assert any("model.layers.0.mlp.down_proj" in error for error in found.errors)
    assert any("model.layers.0.mlp.wo" in note for note in found.notes)
    down = next(layer for layer in found.layers if layer.name.endswith("down_proj"))
    assert len(down.cases) == 4


def test_an_unquantized_model_is_explained_with_a_note(tmp_path: Path) -> None:
    config = llama_config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    del config["quantization_config"]
    shapes = {"q": 256, "k": 128, "v": 128, "o": 256}
    tensors: dict[str, Any] = {
        f"model.layers.0.self_attn.{name}_proj.weight": ("F16", [n, 256])
        for name, n in shapes.items()
    }
    for name, shape in (("gate", [512, 256]), ("up", [512, 256]), ("down", [256, 512])):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] = ("F16", shape)
    tensors["lm_head.weight"] = ("F16", [512, 256])
    write_sparse(tmp_path, config, tensors, 1)
    found = explained(tmp_path)
    assert "--quantization compressed_linear" in found.notes[0]
    parts = [p for layer in found.layers for p in layer.likely.parts]
    assert [str(p.descriptor) for p in parts] == [
        f"{n}x{k}, bf16, bfloat16 → bfloat16"
        for n, k in ((512, 256), (256, 256), (1024, 256), (256, 512), (512, 256))
    ]
    assert all(layer.unquantized == ("the model is not quantized",) for layer in found.layers)
