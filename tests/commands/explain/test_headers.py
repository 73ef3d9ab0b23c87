# SPDX-License-Identifier: Apache-2.0
"""``explain`` of checkpoints that are made for a test: headers are written, data is a hole in the
file."""

from __future__ import annotations

import json
import struct
import time
from math import prod
from pathlib import Path
from typing import Any

import pytest

from tests.support.explained import explained
from tests.support.messages import saying, says
from vllm.compressed_linear.commands.explain.checkpoint import ExplainError
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.explain.layers import model_layers
from vllm.compressed_linear.machine.platform import Platform

_BYTES = {"I32": 4, "F16": 2}


def write_sparse(path: Path, config: dict[str, Any], tensors: dict[str, Any], files: int) -> None:
    """A checkpoint of the right sizes that takes no room on disk."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    step = -(-len(names) // files)
    for index in range(files):
        header, end = {}, 0
        for name in names[index * step : (index + 1) * step]:
            dtype, shape = tensors[name]
            size = prod(shape) * _BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        file = path / f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)


def gptq(name: str, n: int, k: int, group: int = 128) -> dict[str, Any]:
    return {
        f"{name}.qweight": ("I32", [k // 8, n]),
        f"{name}.qzeros": ("I32", [k // group, n // 8]),
        f"{name}.scales": ("F16", [k // group, n]),
        f"{name}.g_idx": ("I32", [k]),
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}


def llama_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "quantization_config": GPTQ,
        **changes,
    }


def llama_tensors(hidden: int, inner: int, kv: int, layers: int, vocab: int) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        for name, n in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            tensors |= gptq(f"{prefix}self_attn.{name}_proj", n, hidden)
        tensors |= gptq(f"{prefix}mlp.gate_proj", inner, hidden)
        tensors |= gptq(f"{prefix}mlp.up_proj", inner, hidden)
        tensors |= gptq(f"{prefix}mlp.down_proj", hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = ("F16", [hidden])
    tensors["model.norm.weight"] = ("F16", [hidden])
    tensors["model.embed_tokens.weight"] = ("F16", [vocab, hidden])
    tensors["lm_head.weight"] = ("F16", [vocab, hidden])
    return tensors


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    write_sparse(tmp_path / "8b", llama_config(), llama_tensors(4096, 14336, 1024, 32, 128256), 4)
    return tmp_path / "8b"


def test_an_8b_checkpoint_takes_less_than_two_seconds_and_no_weights(
    llama_8b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    files = list(llama_8b.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 5e9
    assert sum(file.stat().st_blocks for file in files) * 512 < 1e6
    explained("gptqmodel-gptq-w4-g128-sym")  # imports what is imported at the first time

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    # CPU time: it runs on one thread, and other work on the machine does not count.
    begin = time.process_time()
    found = explained(llama_8b)
    seconds = time.process_time() - begin
    assert seconds < 2, f"{seconds:.2f} s"
    assert len(found.layers) == 32 * 4 + 1
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
    architectures = config["architectures"]
    first, _ = model_layers(tmp_path, architectures, tp_size=2, dtype="auto", quantized=True)
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
    assert "headers alone" in found.notes[0]
    assert [layer.name for layer in found.layers] == [
        "blocks.0.mixer.in_proj",
        "blocks.0.mixer.out_proj",
    ]
    shapes = [layer.likely.parts[0].descriptor for layer in found.layers]
    assert [(d.n, d.in_features) for d in shapes] == [(512, 256), (256, 512)]
    with pytest.raises(ExplainError, match=saying("2 ranks")):
        explained(tmp_path, tp_size=2)


def test_renamed_modules_are_shown_as_configured(tmp_path: Path) -> None:
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
    assert says(found.notes[0], "model.layers.0.mlp.down_proj.*")
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
