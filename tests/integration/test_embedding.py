# SPDX-License-Identifier: Apache-2.0
"""Embedding tables and output heads in vLLM's models: quantized or not, tied or not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.choice import use_backend
from tests.support.explained import loaded_parts, planned_parts
from tests.support.lora import activate, with_adapters
from tests.support.messages import saying, says
from tests.support.model_loading import LoadedModel, engine_args, loaded, logits
from tests.support.reloading import reload
from tests.support.table_models import Bits, TableModel, write
from vllm.compressed_linear import settings
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.backends.registry import NoBackendError, register_backend
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN, detect_platform
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.prepare.plan import PlanEntry
from vllm.compressed_linear.prepare.self_check import SelfCheckError

TIED = {
    "gemma3-8-bit-channel": TableModel(),
    "gemma3-8-bit-group": TableModel(table=Bits(8, 32)),
    "gemma3-6-bit-asymmetric": TableModel(table=Bits(6, 64, symmetric=False)),
    "llama-names-no-table": TableModel("llama", table=Bits(4, 32)),
    "llama-odd-vocabulary": TableModel("llama", table=Bits(8, 32, False), vocabulary=501),
    "qwen2-3-bit": TableModel("qwen2-qkv-bias", table=Bits(3, 32)),
}
UNTIED = {
    "both": TableModel("qwen2-qkv-bias", tied=False, head=Bits(6, 64)),
    "table-only": TableModel("llama", tied=False, table=Bits(8, 32)),
    "head-only": TableModel("llama", tied=False, table=None, head=Bits(8)),
    "neither": TableModel("qwen2-qkv-bias", tied=False, table=None),
}
UNQUANTIZED = {
    "gemma3": TableModel(table=None),
    "gemma-builds-its-table-without-us": TableModel("gemma-tied", table=None),
    "llama-odd-vocabulary": TableModel("llama", table=None, vocabulary=501),
}
OPTIONS = {"skip_tokenizer_init": True}


def worst_error(model: LoadedModel, reference: dict[str, torch.Tensor]) -> float:
    ours = logits(model, reference["input_ids"])
    error = torch.log_softmax(ours, -1) - torch.log_softmax(reference["logits"], -1)
    return float(error.abs().max())


def table_and_head(model: LoadedModel) -> tuple[Any, Any]:
    return model.model.model.embed_tokens, model.model.lm_head


def look_up(table: Any, ids: torch.Tensor) -> torch.Tensor:
    return table(ids)


def entry(name: str) -> PlanEntry:
    found = [e for e in PROCESS_PLAN.entries.values() if e.name == name]
    assert len(found) == 1, [e.name for e in PROCESS_PLAN.entries.values()]
    return found[0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", TIED)
def test_a_quantized_table_serves_the_head_that_is_tied_to_it(
    name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = write(TIED[name], tmp_path / "model")
    use_backend(monkeypatch, backend)
    with loaded(tmp_path / "model", **OPTIONS) as model:
        table, _ = table_and_head(model)
        ids = torch.arange(TIED[name].vocabulary)
        rows = look_up(table, ids)
        native.reset_call_counts()
        assert worst_error(model, reference) <= 1e-4
        counts = native.call_counts()
    torch.testing.assert_close(rows, reference["table"], rtol=1e-6, atol=0)
    planned = entry("lm_head")
    assert planned.backend == backend
    assert "looked up" in planned.descriptor
    assert says(planned.note, "tied", "model.embed_tokens")
    assert not any(e.name == "model.embed_tokens" for e in PROCESS_PLAN.entries.values())
    element = f"uint{TIED[name].table.bits}"  # type: ignore[union-attr]
    assert counts.get(f"embedding/{element}", 0) == (2 if backend == "cpu" else 0)


@pytest.mark.parametrize("name", UNTIED)
def test_a_table_and_a_head_of_their_own(name: str, tmp_path: Path) -> None:
    case = UNTIED[name]
    reference = write(case, tmp_path / "model")
    with loaded(tmp_path / "model", **OPTIONS) as model:
        table, head = table_and_head(model)
        rows = look_up(table, torch.arange(512))
        assert worst_error(model, reference) <= 1e-4
        assert (table.weight.numel() == 0) == (case.table is not None)
        assert head.weight.shape == (0, 128), "nothing reads the natural weight of a head"
    torch.testing.assert_close(rows, reference["table"], rtol=1e-6, atol=0)
    assert entry("lm_head").backend == "cpu"
    tables = [e for e in PROCESS_PLAN.entries.values() if e.name == "model.embed_tokens"]
    assert [e.kind for e in tables] == (["embedding"] if case.table is not None else [])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in UNQUANTIZED for dtype in ("float32", "bfloat16")),
        ("llama-odd-vocabulary", "float16"),
    ],
)
def test_an_unquantized_tied_table_is_kept_once(name: str, dtype: str, tmp_path: Path) -> None:
    case = replace(UNQUANTIZED[name], dtype=getattr(torch, dtype))
    reference = write(case, tmp_path / "model")
    with loaded(tmp_path / "model", dtype, **OPTIONS) as model:
        table, head = table_and_head(model)
        assert table.weight.shape == head.weight.shape == (0, 128)
        assert torch.equal(look_up(table, torch.arange(case.vocabulary)), reference["table"])
        assert worst_error(model, reference) <= (1e-4 if dtype == "float32" else 0.1)
        # Apart from the few numbers that say how the weight is multiplied.
        packed = [
            p for n, p in table.named_parameters() if p.numel() and not n.endswith("_problem")
        ]
        padded = table.num_embeddings_padded
        assert sum(p.nbytes for p in packed) == (padded * 128 * getattr(torch, dtype).itemsize)
        assert not any(p.numel() for p in head.parameters())
    planned = entry("lm_head")
    assert planned.backend == "cpu"
    assert planned.note.startswith("tied: ")
    assert planned.note.endswith("looks up in it")


class LooksUpNothing(ReferenceBackend):
    name = "looks_up_nothing"
    capabilities = replace(ReferenceBackend.capabilities, lookup=False)


@pytest.mark.usefixtures("clean_registry")
def test_a_backend_that_looks_up_nothing_leaves_the_natural_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backend(LooksUpNothing)
    reference = write(TableModel(table=None, dtype=torch.bfloat16), tmp_path / "model")
    monkeypatch.setenv(settings.BACKEND, "unquantized=looks_up_nothing")
    with loaded(tmp_path / "model", "bfloat16", **OPTIONS) as model:
        table, head = table_and_head(model)
        assert table.weight is head.weight
        assert table.weight.shape == (512, 128)
        assert worst_error(model, reference) <= 0.1
    assert entry("lm_head").backend == "looks_up_nothing"
    assert says(entry("lm_head").note, "tied", "model.embed_tokens", "natural weight")


@pytest.mark.usefixtures("clean_registry")
def test_a_quantized_table_needs_a_backend_that_looks_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backend(LooksUpNothing)
    write(TableModel(), tmp_path / "model")
    monkeypatch.setenv(settings.BACKEND, "lm_head=looks_up_nothing")
    message = saying("lm_head", "uint8b128", "looked up", "rows")
    with pytest.raises(NoBackendError, match=message), loaded(tmp_path / "model", **OPTIONS):
        pass


READERS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, ""),
    "lora": ({"enable_lora": True}, ""),
    "drafter": ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, ""),
    "drafter-of-another-package": (
        {"speculative_config": {"model": "package.module.Proposer", "num_speculative_tokens": 2}},
        "a drafter of another package",
    ),
    "head-dtype": ({"hf_overrides": {"head_dtype": "float32"}}, "the head's dtype, float32"),
    "pooling": ({"runner": "pooling", "convert": "embed"}, "pooling"),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_in_vllm_reads_tables(reader: str, tmp_path: Path) -> None:
    from vllm.config import set_current_vllm_config

    write(TableModel("llama", table=None, dtype=torch.bfloat16), tmp_path / "model")
    options, expected = READERS[reader]
    config = engine_args(tmp_path / "model", "bfloat16", **OPTIONS, **options)
    with set_current_vllm_config(config.create_engine_config()):
        assert compat.reader_of_tables() == expected


def test_the_natural_weight_stays_for_whatever_reads_it(tmp_path: Path) -> None:
    """A head in fp32 on a bf16 model: vLLM multiplies with the natural weight by itself."""
    reference = write(TableModel(table=None, dtype=torch.bfloat16), tmp_path / "model")
    options = {"hf_overrides": {"head_dtype": "float32"}}
    with loaded(tmp_path / "model", "bfloat16", **OPTIONS, **options) as model:
        table, head = table_and_head(model)
        assert table.weight is head.weight
        assert worst_error(model, reference) <= 0.1
    assert entry("lm_head").note == (
        "tied: model.embed_tokens looks up in the natural weight, which stays for the head's "
        "dtype, float32"
    )


RELOADED = {
    "quantized": TableModel(table=Bits(8, 32)),
    "quantized-untied": TableModel("llama", tied=False, head=Bits(8)),
    "unquantized": TableModel(table=None),
    "unquantized-without-us": TableModel("gemma-tied", table=None),
}


@pytest.mark.parametrize("kept", [False, True], ids=["packed", "natural-kept"])
@pytest.mark.parametrize("name", RELOADED)
def test_reloaded_tables_and_heads(
    name: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept:
        monkeypatch.setattr(compat, "reader_of_tables", lambda: "a test")
    references = {
        path: write(replace(RELOADED[name], seed=seed), tmp_path / path)
        for path, seed in (("first", 0), ("second", 1))
    }
    with loaded(tmp_path / "first", **OPTIONS) as model:
        before = {n: p.data_ptr() for n, p in model.model.named_parameters() if p.numel()}
        assert worst_error(model, references["first"]) <= 1e-4
        for path in ("second", "first"):
            reload(model, tmp_path / path)
            assert worst_error(model, references[path]) <= 1e-4
            rows = look_up(table_and_head(model)[0], torch.arange(512))
            torch.testing.assert_close(rows, references[path]["table"], rtol=1e-6, atol=0)
        after = {n: p.data_ptr() for n, p in model.model.named_parameters() if p.numel()}
    assert after == before


class WrongRows(ReferenceBackend):
    """Computes well and looks up the row beside."""

    name = "wrong_rows"

    def embedding(self, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        return super().embedding(tensors, (ids + 1) % self.descriptor.n)


@pytest.mark.usefixtures("clean_registry")
def test_a_backend_that_looks_up_wrong_rows_stops_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_backend(WrongRows)
    write(TableModel(), tmp_path / "model")
    monkeypatch.setenv(settings.BACKEND, "lm_head=wrong_rows")
    message = saying("wrong_rows", re.compile(r"channel \d+ of row \d+"))
    with pytest.raises(SelfCheckError, match=message), loaded(tmp_path / "model", **OPTIONS):
        pass


def write_adapter(path: Path, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """An adapter of the table and the head, as PEFT writes it; returns what it adds to each."""
    rank, alpha = 8, 16
    tensors, added = {}, {}
    for name, rows in (("model.embed_tokens", "lora_embedding_A"), ("lm_head", "lora_A.weight")):
        columns = "lora_embedding_B" if "embedding" in rows else "lora_B.weight"
        n, k = (128, 512) if "embedding" in rows else (512, 128)
        a = torch.randn(rank, k, generator=generator) * 0.1
        b = torch.randn(n, rank, generator=generator) * 0.1
        tensors |= {f"base_model.model.{name}.{rows}": a, f"base_model.model.{name}.{columns}": b}
        both = b @ a * (alpha / rank)
        added[name] = both.t() if "embedding" in rows else both
    path.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"}
    targets = {"target_modules": ["embed_tokens", "lm_head"]}
    (path / "adapter_config.json").write_text(json.dumps(config | targets))
    return added


WITH_ADAPTERS = {
    "quantized": TableModel("llama"),
    "quantized-untied": TableModel("llama", tied=False, head=Bits(8)),
    "unquantized": TableModel("llama", table=None),
}


@pytest.mark.parametrize("name", WITH_ADAPTERS)
def test_adapters_of_tables_and_heads(name: str, tmp_path: Path) -> None:
    reference = write(WITH_ADAPTERS[name], tmp_path / "model")
    added = write_adapter(tmp_path / "adapter", torch.Generator().manual_seed(3))
    ids = reference["input_ids"]
    with loaded(tmp_path / "model", **OPTIONS, enable_lora=True, max_lora_rank=8) as model:
        hidden = torch.randn(ids.shape[1], 128, generator=torch.Generator().manual_seed(4))
        rows = look_up(table_and_head(model)[0], ids[0])
        head = model.model.compute_logits(hidden)
        manager = with_adapters(model)
        activate(manager, tmp_path / "adapter", ids.shape[1], prefill=False)
        adapted_rows = look_up(model.model.model.embed_tokens, ids[0])
        adapted_head = model.model.compute_logits(hidden)
        activate(manager, None, ids.shape[1])
        assert torch.equal(look_up(model.model.model.embed_tokens, ids[0]), rows)
    expected_rows = rows + added["model.embed_tokens"][ids[0]]
    torch.testing.assert_close(adapted_rows, expected_rows, rtol=1e-4, atol=1e-4)
    expected_head = head + hidden @ added["lm_head"].t()
    torch.testing.assert_close(adapted_head, expected_head, rtol=1e-4, atol=1e-4)


def test_a_quantized_head_on_disk_is_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    reference = write(UNTIED["head-only"], tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    with loaded(tmp_path / "model", **OPTIONS) as model:
        assert worst_error(model, reference) <= 1e-4
    assert "uint8" in entry("lm_head").descriptor


EXPLAINED = {
    **{f"tied-{name}": model for name, model in TIED.items()},
    **{f"untied-{name}": model for name, model in UNTIED.items()},
    **{f"unquantized-{name}": model for name, model in UNQUANTIZED.items()},
}


@pytest.mark.parametrize("reader", ["", "a test"])
@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_says_what_loading_does(
    name: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "reader_of_tables", lambda: reader)
    write(EXPLAINED[name], tmp_path / "model")
    platform = detect_platform()
    path = str(tmp_path / "model")
    said = explain(path, platform=platform, dtype="float32", read_weights=True)
    with loaded(tmp_path / "model", **OPTIONS):
        entries = list(PROCESS_PLAN.entries.values())
        actual = loaded_parts()
    assert [(p.name, p.kind, p.note) for p in said.layers] == [
        (e.name, e.kind, e.note) for e in entries
    ]
    for layer in said.layers:
        assert planned_parts(layer, layer.likely) == actual[layer.name]
    # What is only looked up is vLLM's, and its size is said.
    left = [(layer.name, layer.method, layer.nbytes) for layer in said.left]
    model = EXPLAINED[name]
    only_looked_up = not model.tied and model.table is None
    table = ("model.embed_tokens", "UnquantizedEmbeddingMethod", model.vocabulary * 128 * 4)
    assert left == ([table] if only_looked_up else [])


def test_a_table_is_explained_from_headers_alone(tmp_path: Path) -> None:
    write(TIED["llama-names-no-table"], tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"architectures": ["NobodyKnows"], "model_type": "nobody"}))
    said = explain(str(tmp_path / "model"), platform=detect_platform())
    (table,) = [layer for layer in said.layers if layer.kind == "embedding"]
    assert table.name == "model.embed_tokens"
    assert "512x128, uint4b8, g32, float32 scale, looked up" in str(
        table.likely.parts[0].descriptor
    )


def test_an_id_beyond_the_table_is_an_error(tmp_path: Path) -> None:
    write(TableModel(), tmp_path / "model")
    with loaded(tmp_path / "model", **OPTIONS) as model:
        table, _ = table_and_head(model)
        with pytest.raises(ValueError, match=saying("ids", 512, 1, 0, 511)):
            look_up(table, torch.tensor([0, 512]))
