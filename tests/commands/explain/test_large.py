# SPDX-License-Identifier: Apache-2.0
"""Models of real sizes: the text stays short, and the time does."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.explained import explained
from tests.support.sparse_checkpoints import (
    GPTQ,
    deepseek_config,
    deepseek_tensors,
    gptq,
    llama_config,
    llama_tensors,
    plain,
    write_sparse,
)
from vllm.compressed_linear.checkpoint import headers
from vllm.compressed_linear.commands.explain.explanation import Explanation
from vllm.compressed_linear.commands.explain.text import print_explanation

LAYERS = 64


def lines(found: Explanation, width: int = 100) -> list[str]:
    out = StringIO()
    print_explanation(found, Console(file=out, width=width))
    return out.getvalue().splitlines()


def unquantized(tensors: dict[str, Any], *words: str) -> dict[str, Any]:
    """``tensors`` with plain weights for the modules whose names have one of ``words``."""
    found = dict(tensors)
    for name, (_, shape) in tensors.items():
        module, _, last = name.rpartition(".")
        if not any(word in name for word in words):
            continue
        del found[name]
        if last == "qweight":
            found |= plain(module, shape[1], shape[0] * 8)
    return found


def llama(path: Path) -> None:
    """Attention is unquantized in all layers, though the configuration does not say so."""
    config = llama_config(num_hidden_layers=LAYERS)
    tensors = llama_tensors(4096, 14336, 1024, LAYERS, 128256)
    write_sparse(path, config, unquantized(tensors, "self_attn"), 4)


def alternating(path: Path) -> None:
    """Every second layer has sliding attention and is quantized with other groups."""
    config = llama_config(
        architectures=["Gemma2ForCausalLM"],
        model_type="gemma2",
        head_dim=128,
        query_pre_attn_scalar=128,
        hidden_activation="gelu_pytorch_tanh",
        sliding_window=4096,
        num_hidden_layers=LAYERS,
        tie_word_embeddings=True,
        quantization_config=GPTQ | {"dynamic": {r"+:.*\.\d*[02468]\.mlp.*": {"group_size": 64}}},
    )
    tensors = llama_tensors(4096, 14336, 1024, LAYERS, 128256)
    del tensors["lm_head.weight"]
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        for norm in ("pre_feedforward_layernorm", "post_feedforward_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = ("F16", [4096])
        for name, n, k in (
            ("gate_proj", 14336, 4096),
            ("up_proj", 14336, 4096),
            ("down_proj", 4096, 14336),
        ):
            tensors |= gptq(f"{layer}.mlp.{name}", n, k, 128 if index % 2 else 64)
    write_sparse(path, config, tensors, 4)


def hybrid(path: Path) -> None:
    """Three layers of linear attention for each of full attention."""
    config = llama_config(
        architectures=["Qwen3_5ForCausalLM"],
        model_type="qwen3_5_text",
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * (LAYERS // 4),
        vocab_size=4096,
    )
    tensors: dict[str, Any] = {}
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = ("F16", [1024])
        for name, n, k in (("gate", 2048, 1024), ("up", 2048, 1024), ("down", 1024, 2048)):
            tensors |= gptq(f"{layer}.mlp.{name}_proj", n, k)
        if index % 4 == 3:
            attention = f"{layer}.self_attn"
            for name, n, k in (
                ("q", 2048, 1024),
                ("k", 256, 1024),
                ("v", 256, 1024),
                ("o", 1024, 1024),
            ):
                tensors |= gptq(f"{attention}.{name}_proj", n, k)
            for norm in ("q_norm", "k_norm"):
                tensors[f"{attention}.{norm}.weight"] = ("F16", [128])
            continue
        attention = f"{layer}.linear_attn"
        tensors |= gptq(f"{attention}.in_proj_qkv", 2048, 1024)
        tensors |= gptq(f"{attention}.in_proj_z", 1024, 1024)
        tensors |= gptq(f"{attention}.out_proj", 1024, 1024)
        for name in ("in_proj_a", "in_proj_b"):
            tensors |= plain(f"{attention}.{name}", 8, 1024)
        tensors[f"{attention}.conv1d.weight"] = ("F16", [2048, 1, 4])
        tensors[f"{attention}.A_log"] = ("F32", [8])
        tensors[f"{attention}.dt_bias"] = ("F16", [8])
        tensors[f"{attention}.norm.weight"] = ("F32", [128])
    tensors["model.norm.weight"] = ("F16", [1024])
    for name in ("model.embed_tokens", "lm_head"):
        tensors |= plain(name, 4096, 1024)
    write_sparse(path, config, tensors, 4)


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("platform", ["cpu:avx2", "cpu:emeraldrapids"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("model", [llama, alternating, hybrid])
def test_sixty_four_layers_take_sixty_lines(
    model: Any, tp: int, platform: str, tmp_path: Path
) -> None:
    model(tmp_path)
    found = explained(tmp_path, tp_size=tp, platform=platform)
    assert not found.errors, found.errors
    assert len(found.layers) > 3 * LAYERS
    for width in (100, 120):
        text = lines(found, width)
        assert len(text) <= 60, "\n".join(text)
        assert max(map(len, text)) <= width
    assert max(map(len, lines(found, 80))) <= 80


def test_a_mixture_of_the_largest_size_takes_seconds_and_reads_headers_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = deepseek_config(2, 8)
    write_sparse(tmp_path / "small", small, deepseek_tensors(small), 1)
    explained(tmp_path / "small", tp_size=2)  # imports what is imported at the first time
    config = deepseek_config()
    write_sparse(tmp_path / "large", config, deepseek_tensors(config), 8)
    files: list[Path] = []
    read = headers.read_file_header

    def counted(file: Path) -> Any:
        files.append(file)
        return read(file)

    monkeypatch.setattr(headers, "read_file_header", counted)
    # CPU time: it runs on one thread, and other work on the machine does not count.
    begin = time.process_time()
    found = explained(tmp_path / "large", platform="cpu:avx2")
    seconds = time.process_time() - begin
    assert len(files) == len(set(files)) == 8
    experts = [left for left in found.left if left.name.endswith("mlp.experts")]
    assert len(experts) == 60
    assert sum(left.nbytes for left in experts) > 500e9
    assert len(lines(found)) <= 60
    print(f"{seconds:.1f} s of CPU time")


@pytest.mark.slow
def test_eight_ranks_of_it_take_seconds_more(tmp_path: Path) -> None:
    config = deepseek_config()
    write_sparse(tmp_path, config, deepseek_tensors(config), 8)
    explained("gptqmodel-gptq-w4-g128-sym")
    begin = time.process_time()
    found = explained(tmp_path, tp_size=8)
    seconds = time.process_time() - begin
    assert len(found.layers) > 100
    print(f"{seconds:.1f} s of CPU time")
