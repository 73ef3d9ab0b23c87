# SPDX-License-Identifier: Apache-2.0
"""``explain`` against what really happens when a checkpoint is loaded."""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.checkpoints import checkpoint, checkpoints, is_ours
from tests.support.explained import explained, loaded_parts, planned_parts
from tests.support.messages import saying, says
from tests.support.model_loading import init_distributed, loaded
from vllm.compressed_linear import settings
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.commands.explain import meta_model
from vllm.compressed_linear.commands.explain.checkpoint import ExplainError
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.explain.layers import TensorParallelError, model_layers
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN, detect_platform
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.plan import DELEGATED, PlanEntry


def plan_after_loading(path: Path, dtype: str = "float32") -> list[PlanEntry]:
    with loaded(path, dtype):
        return list(PROCESS_PLAN.entries.values())


@pytest.mark.parametrize("name", checkpoints(is_ours))
def test_the_plan_of_the_loaded_model_is_one_that_was_named(name: str) -> None:
    named = explained(name, dtype="float32")
    read = explained(name, dtype="float32", read_weights=True)
    entries = plan_after_loading(checkpoint(name))
    actual = loaded_parts()

    assert [layer.name for layer in named.layers] == list(actual)
    for layer in named.layers:
        cases = [planned_parts(layer, case) for case in layer.cases]
        assert actual[layer.name] in cases, layer.name
    # With the small tensors read nothing is left open, and all of it is as predicted.
    assert [len(layer.cases) for layer in read.layers] == [1] * len(read.layers)
    for layer in read.layers:
        assert planned_parts(layer, layer.likely) == actual[layer.name]
    delegated = [(e.name, e.variant, e.note) for e in entries if e.backend == DELEGATED]
    assert [
        (left.name, left.method, left.reason)
        for left in named.left
        if left.name in {name for name, _, _ in delegated}
    ] == delegated


def test_bf16_activations_change_the_prediction_as_they_change_the_load() -> None:
    name = "gptqmodel-gptq-w4-g128-sym"
    named = explained(name, dtype="bfloat16")
    plan_after_loading(checkpoint(name), "bfloat16")
    actual = loaded_parts()
    assert all(
        actual[layer.name] in [planned_parts(layer, case) for case in layer.cases]
        for layer in named.layers
    )
    assert "bfloat16 → bfloat16" in str(named.layers[0].likely.parts[0].descriptor)


@pytest.mark.parametrize("name", checkpoints(lambda entry: entry.act_order is True))
def test_what_the_configuration_claims_comes_first(name: str) -> None:
    first = explained(name).layers[0].likely
    assert first.likely
    assert first.facts[0].startswith("g_idx ")
    assert len(first.parts) == 1


def test_an_explanation_leaves_the_plan_of_this_process_alone() -> None:
    plan_after_loading(checkpoint("llmcompressor-w4a16-sym-g128"))
    before = json.dumps(PROCESS_PLAN.to_json()), PROCESS_PLAN.expected, PROCESS_PLAN.prepared
    explained("llmcompressor-mixed-qv-differ")
    assert (
        json.dumps(PROCESS_PLAN.to_json()),
        PROCESS_PLAN.expected,
        PROCESS_PLAN.prepared,
    ) == before


# Tensor parallelism.


@contextmanager
def rank_loaded(path: Path, rank: int, size: int) -> Iterator[None]:
    """Load one rank's part in this process. All that ranks send each other meanwhile is what each
    has chosen, in the end; here each hears only itself."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None
    init_distributed()
    config = meta_model.engine_config(str(path), dtype="float32", tp_size=size, quantization=None)
    PROCESS_PLAN.reset()
    with (
        meta_model.pretend_parallel(rank, size),
        set_current_vllm_config(config),
        mock.patch.object(compat, "gather_from_ranks", lambda value: [value]),
    ):
        get_model(vllm_config=config)
        yield


@pytest.mark.parametrize(
    "name",
    [
        "gptqmodel-gptq-w4-g32-asym-descact",
        "gptqmodel-gptq-w4-g64-sym-lmhead",
        "autoawq-awq-gemm-g128-asym",
        "llmcompressor-w3a16-sym-g128",
        "llmcompressor-w4a16-sym-channel",
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_loads_what_was_said_of_it(name: str, size: int) -> None:
    found = explained(name, dtype="float32", tp_size=size, read_weights=True)
    for rank in range(size):
        with rank_loaded(checkpoint(name), rank, size):
            actual = loaded_parts()
        for layer in found.layers:
            case = dict(layer.other_ranks).get(rank, layer.cases)[0]
            assert planned_parts(layer, case) == actual[layer.name], (rank, layer.name)


def test_ranks_with_another_part_of_an_activation_order_differ() -> None:
    found = explained("gptqmodel-gptq-w4-g32-asym-descact", tp_size=2, read_weights=True)
    differing = {layer.name.rpartition(".")[2] for layer in found.layers if layer.other_ranks}
    assert differing <= {"o_proj", "down_proj"}


def test_a_model_that_cannot_be_split_so_says_why() -> None:
    with pytest.raises(TensorParallelError, match="tensor parallel size"):
        explained("gptqmodel-gptq-w4-g128-sym", tp_size=3)


# Other machines and settings.


def test_another_machine_may_choose_otherwise() -> None:
    path = str(checkpoint("gptqmodel-gptq-w4-g128-sym"))
    old = explain(path, platform=Platform.parse("cpu:avx2"))
    assert {p.variant for layer in old.layers for p in layer.likely.parts} == {"avx2"}
    gpu = explain(path, platform=Platform.parse("cuda:90"))
    part = gpu.layers[0].likely.parts[0]
    reasons = {r.backend: r.reasons for r in part.rejected}
    assert says(reasons["cpu"][0], "device cuda", "cpu")
    assert part.backend != "cpu"


def test_a_backend_that_was_asked_for_and_cannot_is_an_error_with_its_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(settings.BACKEND, "*.down_proj=vllm_native")
    found = explained("gptqmodel-gptq-w8-g64-asym-descact")
    assert len(found.errors) == 2
    assert "model.layers.0.mlp.down_proj" in found.errors[0]
    assert says(found.errors[0], "8-bit", "integer", 4)


def test_a_backend_that_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.BACKEND, "reference")
    found = explained("gptqmodel-gptq-w4-g128-sym", dtype="float32")
    plan_after_loading(checkpoint("gptqmodel-gptq-w4-g128-sym"))
    actual = loaded_parts()
    assert all(
        actual[layer.name] in [planned_parts(layer, case) for case in layer.cases]
        for layer in found.layers
    )
    quantized = [layer for layer in found.layers if not layer.unquantized]
    assert {(p.backend, p.chosen_by) for layer in quantized for p in layer.likely.parts} == {
        ("reference", "asked for")
    }


def test_the_switch_turns_all_of_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.ENABLE, "0")
    found = explained("gptqmodel-gptq-w4-g128-sym")
    assert not found.layers
    assert says(found.notes[0], settings.ENABLE)


def test_a_model_id_means_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cached = tmp_path / "models--some--model"
    shutil.copytree(checkpoint("gptqmodel-gptq-w4-g128-sym"), cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = explain("some/model", platform=detect_platform())
    assert found.model == "some/model"
    assert len(found.layers) == 9


# Checkpoints that are made for a test: headers are written, data is a hole in the file.

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


@pytest.mark.parametrize("name", ["hqq-w4-g64", "llmcompressor-nvfp4"])
def test_what_is_left_to_vllm_altogether_is_said(name: str) -> None:
    found = explained(name)
    assert not found.layers
    assert "left to vLLM" in found.notes[0]


# Damage.


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint("gptqmodel-gptq-w4-g128-sym"), copy)
    return copy


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        config["quantization_config"].pop(key, None)
        if value is not None:
            config["quantization_config"][key] = value
    (path / "config.json").write_text(json.dumps(config))


def test_a_config_without_bits(damaged: Path) -> None:
    change_config(damaged, bits=None)
    with pytest.raises(ConfigError, match=saying("bits")):
        explained(damaged)


def test_a_config_that_contradicts_the_tensors(damaged: Path) -> None:
    change_config(damaged, group_size=32)
    with pytest.raises(
        CheckpointError, match=saying(re.compile(r"q_proj\.(qzeros|scales)"), "shape")
    ):
        explained(damaged)


def test_a_truncated_file(damaged: Path) -> None:
    file = next(damaged.glob("*.safetensors"))
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size - 1000)
    with pytest.raises(ExplainError, match=saying("truncated")):
        explained(damaged)


def test_a_missing_tensor(damaged: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = next(damaged.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.scales"]
    save_file(tensors, file)
    missing = saying("model.layers.1.mlp.down_proj.scales", "checkpoint")
    with pytest.raises((CheckpointError, ConfigError), match=missing):
        explained(damaged)


def test_values_are_checked_when_they_are_read(damaged: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = next(damaged.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.scales"][0, 5] = float("nan")
    save_file(tensors, file)
    assert not explained(damaged).errors
    with pytest.raises(CheckpointError, match=saying("1.mlp.down_proj.scales", "finite")):
        explained(damaged, read_weights=True)


def test_a_missing_file(damaged: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExplainError, match=saying("model-00002-of-00002.safetensors")):
        explained(damaged)


def test_a_model_that_is_nowhere() -> None:
    with pytest.raises(ExplainError, match=saying("/nowhere/at/all")):
        explained(Path("/nowhere/at/all"))
    with pytest.raises(ExplainError, match=saying("nobody/no-such-model", "cache")):
        explain("nobody/no-such-model", platform=detect_platform())
