# SPDX-License-Identifier: Apache-2.0
"""The plan is complete once vLLM has loaded a model of any kind: logged, and in its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.messages import says
from tests.support.model_loading import loaded
from tests.support.synthetic import Model, Quant, write
from tests.support.table_models import Bits, TableModel
from tests.support.table_models import write as write_table_model
from tests.support.word_tokenizer import write_tokenizer
from vllm.compressed_linear import settings
from vllm.compressed_linear.integration import preparation
from vllm.compressed_linear.integration.config import NAME

UNTIED = Model(Quant("gptq"))
TIED = TableModel("llama", table=None)
POOLING = {"runner": "pooling"}
EMBED = POOLING | {"convert": "embed"}
CLASSIFY = POOLING | {
    "convert": "classify",
    "hf_overrides": {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3},
}


def _reranker(method: str) -> dict[str, Any]:
    overrides = {
        "architectures": ["LlamaForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "method": method,
    }
    return POOLING | {"hf_overrides": overrides}


KINDS: dict[str, tuple[Model | TableModel, dict[str, Any], set[str]]] = {
    "generate": (UNTIED, {}, {"lm_head"}),
    "generate-tied": (TIED, {}, {"lm_head"}),
    "generate-quantized-table": (TableModel("llama", table=Bits(8, 32)), {}, {"lm_head"}),
    "generate-quantized-head": (
        TableModel("llama", tied=False, table=None, head=Bits(8)),
        {},
        {"lm_head"},
    ),
    "embed": (UNTIED, EMBED, set()),
    "embed-tied": (TIED, EMBED, set()),
    "classify": (UNTIED, CLASSIFY, {"score"}),
    "rerank": (UNTIED, _reranker("from_2_way_softmax"), set()),
    "rerank-tied": (TIED, _reranker("from_2_way_softmax"), set()),
    "rerank-no-post-processing": (UNTIED, _reranker("no_post_processing"), set()),
}


def _write(model: Model | TableModel, path: Path, options: dict[str, Any]) -> None:
    if isinstance(model, Model):
        write(model, path)
    else:
        write_table_model(model, path)
    write_tokenizer(path, ["no", "yes"])
    if options is CLASSIFY:
        tensors = load_file(path / "model.safetensors")
        tensors["score.weight"] = torch.randn(3, 128)
        save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("opted_in", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_is_logged_and_written(
    kind: str, opted_in: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options, others = KINDS[kind]
    if opted_in and (not isinstance(model, Model) and (model.table or model.head)):
        pytest.skip("quantized by definition")
    _write(model, tmp_path / "model", options)
    if opted_in:
        options = options | {"quantization": NAME}
        _dequantized(tmp_path / "model")
    plan_file = tmp_path / "plan.json"
    monkeypatch.setenv(settings.PLAN_FILE, str(plan_file))
    said: list[str] = []
    monkeypatch.setattr(preparation.logger, "info", lambda text, *args: said.append(text % args))
    with loaded(tmp_path / "model", **options):
        pass
    assert [text.partition(":")[0] for text in said] == [NAME]
    names = {layer["name"] for layer in json.loads(plan_file.read_text())["layers"]}
    assert {name for name in names if "layers." not in name} == others
    assert sum("layers.0" in name for name in names) == 4


def test_a_plan_file_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(UNTIED, tmp_path / "model")
    plan_file = tmp_path / "no such directory" / "plan.json"
    monkeypatch.setenv(settings.PLAN_FILE, str(plan_file))
    said: list[str] = []
    monkeypatch.setattr(preparation.logger, "warning", lambda text, *args: said.append(text % args))
    with loaded(tmp_path / "model", skip_tokenizer_init=True):
        pass
    assert len(said) == 1
    assert says(said[0], plan_file, "No such file or directory")


def _dequantized(path: Path) -> None:
    """The same files without quantization: codes are replaced by random weights."""
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config", None)
    (path / "config.json").write_text(json.dumps(config))
    hidden, width = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    tensors = {
        name: tensor
        for name, tensor in load_file(path / "model.safetensors").items()
        if "_proj." not in name
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape) * 0.05
    save_file(tensors, path / "model.safetensors")
