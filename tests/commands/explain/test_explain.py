# SPDX-License-Identifier: Apache-2.0
"""``explain`` against what really happens when a checkpoint is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.support.checkpoints import checkpoint, checkpoints, is_ours
from tests.support.explained import explained, loaded_parts, planned_parts
from tests.support.messages import says
from tests.support.model_loading import init_distributed, loaded
from vllm.compressed_linear import settings
from vllm.compressed_linear.commands.explain import meta_model
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.explain.layers import TensorParallelError
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
    variants = {p.variant for layer in old.layers for p in layer.likely.parts}
    assert {variant.rpartition(" ")[2] for variant in variants} == {"avx2"}
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


@pytest.mark.parametrize("name", ["hqq-w4-g64", "torchao-int8wo"])
def test_what_is_left_to_vllm_altogether_is_said(name: str) -> None:
    found = explained(name)
    assert not found.layers
    assert "left to vLLM" in found.notes[0]


def test_where_vllm_rounds_x_the_option_that_does_so_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = checkpoint("gptqmodel-gptq-w4-g128-sym")
    for rounds, platform, said in (
        ("1", "cpu:sapphirerapids", True),
        ("0", "cpu:sapphirerapids", False),
        ("1", "cpu:zen4", False),
    ):
        monkeypatch.setenv("VLLM_CPU_INT4_W4A8", rounds)
        found = explain(str(path), platform=Platform.parse(platform), settings=settings.Settings())
        assert any("cpu_int8_fast" in note for note in found.notes) == said


def test_the_paths_of_absent_processors_are_shown() -> None:
    path = checkpoint("gptqmodel-gptq-w4-g128-sym")
    found = explain(
        str(path), platform=Platform.parse("cpu:sapphirerapids"), settings=settings.Settings()
    )
    variants = {part.variant for layer in found.layers for part in layer.likely.parts}
    assert any("avx512vnni to M=" in variant and "amx" in variant for variant in variants)
    assert (found.platform, found.rates) == ("cpu:sapphirerapids", "")
    assert "rates" in explained("gptqmodel-gptq-w4-g128-sym").rates
