# SPDX-License-Identifier: Apache-2.0
"""Targets and drafters in one process: each has a head and a table of its own, or one in common."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import checkpoint, checkpoint_reference
from tests.support.drafters import (
    VOCABULARY,
    Eagle3,
    after,
    drafts,
    loaded_with_drafter,
    write_clock,
    write_clock_with_mtp,
    write_eagle3,
)
from tests.support.lora import activate, with_adapters
from tests.support.messages import says
from tests.support.model_loading import LoadedModel, loaded, logits
from tests.support.reloading import reload
from tests.support.synthetic import Quant
from tests.support.table_models import Bits, TableModel
from vllm.compressed_linear import settings
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN, detect_platform
from vllm.compressed_linear.prepare.plan import Plan

QUANTIZED_HEAD = TableModel("llama", tied=False, table=None, head=Bits(8))
GROUPED_HEAD = replace(QUANTIZED_HEAD, head=Bits(4, 32))
PLAIN_HEAD = TableModel("llama", tied=False, table=None)
QUANTIZED_TABLE = TableModel("llama", tied=False, table=Bits(8), head=Bits(8))
TIED_QUANTIZED_TABLE = TableModel("llama", table=Bits(8))
TIED_PLAIN_TABLE = TableModel("llama", table=None)

HALF = torch.arange(VOCABULARY).view(-1, 2, 8)[:, 1].flatten()
"""Every second hour."""
EVERY_TOKEN = torch.arange(VOCABULARY)

GROUPED_EAGLE3 = Eagle3(head=Bits(4, 32))
LAYER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)

OWN_HEAD = {
    "both-quantized": (QUANTIZED_HEAD, Eagle3()),
    "both-quantized-in-groups": (
        replace(QUANTIZED_HEAD, head=Bits(4, 32)),
        Eagle3(head=Bits(4, 32)),
    ),
    "both-plain": (PLAIN_HEAD, Eagle3(head=None)),
    "quantized-and-plain": (QUANTIZED_HEAD, Eagle3(head=None)),
    "plain-and-quantized": (PLAIN_HEAD, Eagle3()),
    "tied-to-a-quantized-table": (TIED_QUANTIZED_TABLE, Eagle3(own_table=True)),
    "tied-to-a-plain-table": (TIED_PLAIN_TABLE, Eagle3(own_table=True)),
    "quantized-table": (QUANTIZED_TABLE, Eagle3()),
    "own-quantized-table": (QUANTIZED_HEAD, Eagle3(own_table=True, table=Bits(8))),
    "unquantized-drafter": (QUANTIZED_TABLE, Eagle3(linear=None, head=None)),
    "half-the-vocabulary": (QUANTIZED_HEAD, Eagle3(tokens=HALF)),
    "half-the-vocabulary-plain": (QUANTIZED_TABLE, Eagle3(head=None, tokens=HALF)),
}
SHARED_HEAD = {
    "quantized": (QUANTIZED_HEAD, Eagle3(own_head=False)),
    "plain": (PLAIN_HEAD, Eagle3(own_head=False)),
    "tied-to-a-quantized-table": (TIED_QUANTIZED_TABLE, Eagle3(own_head=False)),
    "tied-to-a-plain-table": (TIED_PLAIN_TABLE, Eagle3(own_head=False)),
    "unquantized-drafter": (QUANTIZED_TABLE, Eagle3(linear=None, own_head=False)),
    "equal-quantized": (QUANTIZED_HEAD, Eagle3(tells=1)),
}


def speculative(path: Path, **changes: Any) -> dict[str, Any]:
    return {"method": "eagle3", "model": str(path), "num_speculative_tokens": 1} | changes


@pytest.mark.parametrize("case", OWN_HEAD)
def test_a_drafter_keeps_its_own_head(case: str, tmp_path: Path) -> None:
    target, drafter = OWN_HEAD[case]
    write_clock(tmp_path / "target", target)
    write_eagle3(tmp_path / "drafter", drafter)
    tokens = EVERY_TOKEN if drafter.tokens is None else drafter.tokens
    with loaded_with_drafter(tmp_path / "target", speculative(tmp_path / "drafter")) as (
        model,
        proposer,
    ):
        found = drafts(model, proposer, tokens)
        own_table = proposer.model.model.embed_tokens is not model.model.model.embed_tokens
        assert proposer.model.lm_head is not model.model.lm_head
    assert found.tolist() == after(tokens, 2).tolist()
    assert own_table == drafter.own_table


@pytest.mark.parametrize("case", SHARED_HEAD)
def test_a_drafter_without_a_head_of_its_own_uses_the_target_s(case: str, tmp_path: Path) -> None:
    target, drafter = SHARED_HEAD[case]
    write_clock(tmp_path / "target", target)
    write_eagle3(tmp_path / "drafter", drafter)
    with loaded_with_drafter(tmp_path / "target", speculative(tmp_path / "drafter")) as (
        model,
        proposer,
    ):
        found = drafts(model, proposer, EVERY_TOKEN)
        assert proposer.model.lm_head is model.model.lm_head
        assert proposer.model.model.embed_tokens is model.model.model.embed_tokens
    assert found.tolist() == after(EVERY_TOKEN, 1).tolist()


NAMED = {
    "classes": Eagle3(),
    "layer-in-a-list": Eagle3(layer="layers.0"),
    "names": Eagle3(targets=(*(f"midlayer.{name}" for name in LAYER), "fc")),
    "some-names": Eagle3(targets=("midlayer.self_attn.v_proj", "midlayer.mlp.up_proj", "fc")),
    "anchored-expressions": Eagle3(targets=(r"re:^midlayer\..*_proj$", "re:^fc$")),
    "expressions-in-a-list": Eagle3(
        targets=(r"re:^layers\.0\.self_attn\.[qk]_proj$", r"re:^layers\.0\.mlp\..*_proj$"),
        layer="layers.0",
    ),
    "gptq": Eagle3(gptq=Quant("gptq"), head=None),
    "gptq-in-an-order": Eagle3(gptq=Quant("gptq", act_order=True, symmetric=False), head=None),
    "gptq-with-rules": Eagle3(
        gptq=Quant("gptq"), head=None, dynamic=((r"midlayer\.self_attn\.v_proj", Quant("gptq", 8)),)
    ),
    "gptq-with-rules-in-a-list": Eagle3(
        gptq=Quant("gptq"),
        head=None,
        layer="layers.0",
        dynamic=((r"layers\.0\.(self_attn\.k_proj|mlp\.gate_proj)", Quant("gptq", 8)),),
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_drafter_s_file_is_read_by_its_own_names(case: str, tmp_path: Path) -> None:
    """vLLM numbers its layer after the target's, and tells its config nothing of fused layers."""
    write_clock(tmp_path / "target", PLAIN_HEAD)
    meanings = write_eagle3(tmp_path / "drafter", NAMED[case])
    front = f"{NAMED[case].layer}."
    with loaded_with_drafter(tmp_path / "target", speculative(tmp_path / "drafter")) as (
        _,
        proposer,
    ):
        layer = proposer.model.model.layers[0]
        expected = {
            "fc": (proposer.model.model.fc, ["fc"]),
            "qkv": (layer.self_attn.qkv_proj, [f"{front}self_attn.{x}_proj" for x in "qkv"]),
            "o": (layer.self_attn.o_proj, [f"{front}self_attn.o_proj"]),
            "gate-up": (layer.mlp.gate_up_proj, [f"{front}mlp.{x}_proj" for x in ("gate", "up")]),
            "down": (layer.mlp.down_proj, [f"{front}mlp.down_proj"]),
            "head": (proposer.model.lm_head, ["lm_head"]),
        }
        for name, (module, parts) in expected.items():
            weight = torch.cat([meanings[part] for part in parts])
            x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(5))
            found = module.quant_method.apply(module, x)
            torch.testing.assert_close(found, x @ weight.T, rtol=1e-4, atol=1e-4, msg=name)


def names(plan: Plan) -> set[str]:
    return {entry.name for entry in plan.entries.values()}


def test_the_plan_keeps_target_and_drafter_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clock(tmp_path / "target", QUANTIZED_HEAD)
    write_eagle3(tmp_path / "drafter", GROUPED_EAGLE3)
    write_eagle3(tmp_path / "other", Eagle3())
    monkeypatch.setenv(settings.PLAN_FILE, str(tmp_path / "plan.json"))
    fingerprints = []
    for name in ("drafter", "other"):
        with loaded_with_drafter(tmp_path / "target", speculative(tmp_path / name)):
            plan = PROCESS_PLAN.drafters[str(tmp_path / name)]
            assert PROCESS_PLAN.prepared == PROCESS_PLAN.expected == 9
            assert plan.prepared == plan.expected == 6
            assert len(names(PROCESS_PLAN)) == 9
            assert "lm_head" in names(PROCESS_PLAN) & names(plan)
            assert says(plan.summary(), str(tmp_path / name), 6, "layers")
            fingerprints.append(PROCESS_PLAN.fingerprint())
        written = json.loads((tmp_path / "plan.json").read_text())
        assert written["fingerprint"] == fingerprints[-1]
        assert len(written["layers"]) == 9
        (drafter,) = written["drafters"]
        assert drafter["model"] == str(tmp_path / name)
        heads = {e["name"]: e["descriptor"] for e in drafter["layers"]}
        assert ("uint4b8" in heads["lm_head"]) == (name == "drafter")
    assert fingerprints[0] != fingerprints[1]


@pytest.mark.parametrize("case", SHARED_HEAD)
def test_the_plan_has_no_head_that_the_drafter_takes_from_its_target(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = SHARED_HEAD[case]
    write_clock(tmp_path / "target", target)
    write_eagle3(tmp_path / "drafter", drafter)
    monkeypatch.setenv(settings.PLAN_FILE, str(tmp_path / "plan.json"))
    with loaded_with_drafter(tmp_path / "target", speculative(tmp_path / "drafter")):
        gc.collect()
        drafters = json.loads((tmp_path / "plan.json").read_text())["drafters"]
        assert "lm_head" in names(PROCESS_PLAN)
        for plan in PROCESS_PLAN.drafters.values():
            assert "lm_head" not in names(plan)
    assert [e["name"] for plan in drafters for e in plan["layers"] if e["name"] == "lm_head"] == []


DRAFT_MODELS = (
    "gptqmodel-gptq-dynamic",
    "gptqmodel-gptq-w4-g64-sym-lmhead",
    "autoround-native-mixed",
    "autoawq-awq-gemm-g64-asym-skip-v",
    "llmcompressor-mixed-int8attn-int4mlp",
    "llmcompressor-mixed-qv-differ",
)


@pytest.mark.parametrize("name", DRAFT_MODELS)
def test_a_draft_model_computes_what_it_does_as_a_target(name: str) -> None:
    """vLLM puts ``draft_model.`` in front of its names."""
    path = checkpoint(name)
    input_ids = checkpoint_reference(name)["input_ids"][:1]
    drafter = speculative(path, method="draft_model")
    with loaded_with_drafter(path, drafter, max_model_len=128) as (model, proposer):
        target, drafter_s = (
            logits(LoadedModel(each, model.config), input_ids)
            for each in (model.model, proposer.model)
        )
        plan = PROCESS_PLAN.drafters[str(path)]
        assert names(plan) == {f"draft_model.{name}" for name in names(PROCESS_PLAN)}
        assert [e.descriptor for e in plan.entries.values()] == [
            e.descriptor for e in PROCESS_PLAN.entries.values()
        ]
    torch.testing.assert_close(drafter_s, target, rtol=0, atol=0)


def test_a_drafter_has_a_load_format_of_its_own(tmp_path: Path) -> None:
    write_clock(tmp_path / "target", QUANTIZED_HEAD)
    write_eagle3(tmp_path / "drafter", Eagle3())
    for target, drafter in (("safetensors", "dummy"), ("dummy", "safetensors")):
        own = speculative(tmp_path / "drafter", draft_load_config={"load_format": drafter})
        with loaded_with_drafter(tmp_path / "target", own, load_format=target) as (_, proposer):
            assert proposer.model.lm_head.quant_method.prepared is not None


def test_an_unquantized_model_and_its_drafter_opt_in_separately(tmp_path: Path) -> None:
    write_clock(tmp_path / "target", replace(PLAIN_HEAD, linear=None))
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "target" / "config.json").write_text(json.dumps(config))
    write_eagle3(tmp_path / "drafter", Eagle3(linear=None, head=None))
    ours = {"quantization": "compressed_linear"}
    for target, drafter in ((ours, ours), (ours, {}), ({}, ours)):
        own = speculative(tmp_path / "drafter", **drafter)
        with loaded_with_drafter(tmp_path / "target", own, **target) as (model, proposer):
            assert drafts(model, proposer, EVERY_TOKEN).tolist() == after(EVERY_TOKEN, 2).tolist()
            assert bool(PROCESS_PLAN.entries) == bool(target)
            assert any(map(names, PROCESS_PLAN.drafters.values())) == bool(drafter)


MTP = {
    "quantized-head": replace(QUANTIZED_HEAD, family="qwen2-qkv-bias"),
    "quantized-table-and-head": replace(QUANTIZED_TABLE, family="qwen2-qkv-bias"),
    "plain-head": replace(PLAIN_HEAD, family="qwen2-qkv-bias"),
}


@pytest.mark.parametrize("case", MTP)
def test_multi_token_prediction_uses_the_target_s_head_and_table(case: str, tmp_path: Path) -> None:
    """vLLM's MiMo builds head and table without asking, and calls its layer otherwise than the file
    does, which is the target's."""
    write_clock_with_mtp(tmp_path / "target", MTP[case])
    drafter = {"method": "mtp", "num_speculative_tokens": 1}
    with loaded_with_drafter(tmp_path / "target", drafter) as (model, proposer):
        assert proposer.model.lm_head is model.model.lm_head
        assert proposer.model.model.embed_tokens is model.model.model.embed_tokens
        found = drafts(model, proposer, EVERY_TOKEN)
        gc.collect()
        (plan,) = PROCESS_PLAN.drafters.values()
        parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        assert names(plan) == {f"model.layers.2.{part}" for part in parts}
        assert all("uint4b8" in entry.descriptor for entry in plan.entries.values())
    assert found.tolist() == after(EVERY_TOKEN, 2).tolist()


def test_a_drafter_is_explained_by_its_own_files(tmp_path: Path) -> None:
    """vLLM cannot build it without a target, so the checkpoint is not at fault."""
    write_eagle3(tmp_path / "drafter", Eagle3())
    found = explain(str(tmp_path / "drafter"), platform=detect_platform())
    assert {f"midlayer.{name}" for name in LAYER} < {layer.name for layer in found.layers}
    assert says(" ".join(found.notes), "LlamaForCausalLMEagle3", "drafter", "--speculative-config")
    assert not found.errors


@pytest.mark.parametrize("case", ["both-quantized", "both-plain"])
def test_a_target_with_a_drafter_reloads_its_weights(case: str, tmp_path: Path) -> None:
    target, drafter = OWN_HEAD[case]
    write_clock(tmp_path / "target", target)
    write_eagle3(tmp_path / "drafter", drafter)
    with loaded_with_drafter(tmp_path / "target", speculative(tmp_path / "drafter")) as (
        model,
        proposer,
    ):
        before = PROCESS_PLAN.fingerprint()
        reload(model, tmp_path / "target")
        assert drafts(model, proposer, EVERY_TOKEN).tolist() == after(EVERY_TOKEN, 2).tolist()
        assert PROCESS_PLAN.fingerprint() == before


@pytest.mark.parametrize("case", ["both-quantized", "both-plain"])
def test_a_target_with_adapters_has_a_drafter(case: str, tmp_path: Path) -> None:
    from vllm.v1.spec_decode.eagle import EagleProposer

    target, drafter = OWN_HEAD[case]
    write_clock(tmp_path / "target", target)
    write_eagle3(tmp_path / "drafter", drafter)
    options = {"skip_tokenizer_init": True, "enable_lora": True, "max_lora_rank": 8}
    own = speculative(tmp_path / "drafter")
    with loaded(tmp_path / "target", speculative_config=own, **options) as model:
        activate(with_adapters(model), None, VOCABULARY)
        proposer = EagleProposer(model.config, torch.device("cpu"))
        proposer.load_model(model.model)
        assert drafts(model, proposer, EVERY_TOKEN).tolist() == after(EVERY_TOKEN, 2).tolist()


def test_a_head_is_prepared_once_and_its_natural_weight_is_freed(tmp_path: Path) -> None:
    write_clock(tmp_path / "target", PLAIN_HEAD)
    write_eagle3(tmp_path / "drafter", Eagle3(head=None))
    with loaded_with_drafter(tmp_path / "target", speculative(tmp_path / "drafter")) as (
        model,
        proposer,
    ):
        for head in (model.model.lm_head, proposer.model.lm_head):
            assert head.weight.shape == (0, 128)
