# SPDX-License-Identifier: Apache-2.0
"""Headers alone tell what loading would report."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.architectures import FAMILIES, WITHOUT_LOGITS
from tests.support.edited import edited
from tests.support.messages import says
from tests.support.model_loading import init_distributed
from tests.support.written_families import CheckpointOf, written_once
from vllm.compressed_linear.checkpoint.completeness import Finding, Severity
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers, read_headers
from vllm.compressed_linear.commands.explain import meta_model
from vllm.compressed_linear.integration.completeness_from_headers import findings_from_headers
from vllm.compressed_linear.integration.config import NAME

pytestmark = pytest.mark.usefixtures("inspect_in_process")

LAYER = "model.layers.0"
EXPERTS = f"{LAYER}.block_sparse_moe.experts"
FAMILY = {
    "dense": FAMILIES["qwen2-qkv-bias"],
    "experts": FAMILIES["mixtral"],
    "hybrid": WITHOUT_LOGITS["qwen3-next-tuple-shards"],
}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> CheckpointOf:
    return written_once(FAMILY, tmp_path_factory)


def findings(
    path: Path, headers: Mapping[str, TensorHeader] | None = None, *, tp_size: int = 1
) -> list[Finding]:
    init_distributed()
    quantized = "quantization_config" in json.loads((path / "config.json").read_text())
    config = meta_model.engine_config(
        str(path), dtype="float32", tp_size=tp_size, quantization=None if quantized else NAME
    )
    headers = headers or read_headers(path) or {}
    with meta_model.built_on_meta(config, 0, lambda copied: None) as (model, quant_config):
        return findings_from_headers(model, config, quant_config, headers)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("form", ["gptq", ""])
@pytest.mark.parametrize("family", FAMILY)
def test_nothing_is_found_in_complete_checkpoints(
    family: str, form: str, tp_size: int, checkpoint_of: CheckpointOf
) -> None:
    assert findings(checkpoint_of(family, form), tp_size=tp_size) == []


@pytest.mark.parametrize(
    ("family", "form", "dropped", "said"),
    [
        ("dense", "gptq", ["model.norm.weight"], ["model.norm.weight"]),
        (
            "dense",
            "gptq",
            [f"{LAYER}.self_attn.k_proj.bias"],
            ["rows 128 to 191", f"expected {LAYER}.self_attn.k_proj.bias"],
        ),
        (
            "dense",
            "",
            [f"{LAYER}.mlp.up_proj.weight"],
            ["rows 256 to 511", f"expected {LAYER}.mlp.up_proj.weight"],
        ),
        # The first expert, which is loaded, and another, which is compared with it.
        ("experts", "gptq", [f"{EXPERTS}.0.w2.weight"], [f"{EXPERTS}.routed_experts.w2_weight"]),
        ("experts", "gptq", [f"{EXPERTS}.2.w2.weight"], [f"{EXPERTS}.2.w2.weight"]),
        (
            "experts",
            "",
            [f"{EXPERTS}.3.{w}.weight" for w in ("w1", "w2", "w3")],
            [f"{EXPERTS}.3."],
        ),
        ("hybrid", "gptq", [f"{LAYER}.linear_attn.norm.weight"], ["linear_attn.norm.weight"]),
    ],
)
def test_what_is_missing_is_an_error(
    family: str,
    form: str,
    dropped: Collection[str],
    said: Collection[str],
    checkpoint_of: CheckpointOf,
    tmp_path: Path,
) -> None:
    found = findings(edited(checkpoint_of(family, form), tmp_path / "edited", drop=dropped))
    assert {finding.severity for finding in found} == {Severity.ERROR}
    assert any(says(finding.message, *said) for finding in found)


@pytest.mark.parametrize(
    ("add", "severity", "said"),
    [
        ({f"{LAYER}.act.scales": torch.ones(2)}, Severity.WARNING, f"{LAYER}.act.scales"),
        ({"lm_head.bias": torch.ones(512)}, Severity.NOTE, "lm_head.bias"),
        ({"model.norm.weight": torch.ones(96)}, Severity.ERROR, "model.norm.weight"),
    ],
)
def test_what_is_left_over_or_refused(
    add: Mapping[str, torch.Tensor],
    severity: Severity,
    said: str,
    checkpoint_of: CheckpointOf,
    tmp_path: Path,
) -> None:
    (finding,) = findings(edited(checkpoint_of("dense", "gptq"), tmp_path / "edited", add=add))
    assert finding.severity is severity
    assert says(finding.message, said)


def large_mixture(path: Path) -> tuple[Path, Headers]:
    """61 layers of 384 experts: the configuration, and the headers that its files would have."""
    layers, experts, hidden, width = 61, 384, 256, 64
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 512,
        "hidden_size": hidden,
        "intermediate_size": 256,
        "moe_intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 128,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (512, hidden),
        "lm_head.weight": (512, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in (f"model.layers.{i}" for i in range(layers)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (hidden,)
        for part, rows in (("q", 256), ("k", 128), ("v", 128)):
            shapes[f"{layer}.self_attn.{part}_proj.weight"] = (rows, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, 256)
        for norm in ("q_norm", "k_norm"):
            shapes[f"{layer}.self_attn.{norm}.weight"] = (64,)
        shapes[f"{layer}.mlp.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for part in ("gate_proj", "up_proj"):
                shapes[f"{layer}.mlp.experts.{expert}.{part}.weight"] = (width, hidden)
            shapes[f"{layer}.mlp.experts.{expert}.down_proj.weight"] = (hidden, width)
    headers = {name: TensorHeader("float32", shape, 0, "f") for name, shape in shapes.items()}
    return path, Headers(headers)


def test_a_large_mixture_takes_no_longer_than_its_layers(tmp_path: Path) -> None:
    init_distributed()
    path, headers = large_mixture(tmp_path)
    config = meta_model.engine_config(str(path), dtype="float32", tp_size=1, quantization=NAME)
    with meta_model.built_on_meta(config, 0, lambda copied: None) as (model, quant_config):
        begin = time.process_time()
        found = findings_from_headers(model, config, quant_config, headers)
        print(f"{time.process_time() - begin:.1f} s of CPU time")
    assert found == []
    missing = "model.layers.33.mlp.experts.200.up_proj.weight"
    without = Headers({name: header for name, header in headers.items() if name != missing})
    with meta_model.built_on_meta(config, 0, lambda copied: None) as (model, quant_config):
        (finding,) = findings_from_headers(model, config, quant_config, without)
    assert finding.severity is Severity.ERROR
    assert finding.names == (missing,)
