# SPDX-License-Identifier: Apache-2.0
"""``tune``: what it measures, on backends that compute right and take the time a test gives them,
and what loading then chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import checkpoint
from tests.support.messages import saying
from tests.support.model_loading import loaded
from tests.support.timed_toys import MODEL, Fast, Toy, tuned
from vllm.compressed_linear import settings
from vllm.compressed_linear.backends import measurements, registry
from vllm.compressed_linear.backends.measurements import MachineKey, TuneFileError, read
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.tune import tune as tuning
from vllm.compressed_linear.commands.tune.tune import Measuring, TuneError
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN, detect_platform
from vllm.compressed_linear.machine.cost import MIX
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.self_check import SelfCheckError
from vllm.compressed_linear.settings import Settings
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.testing import Case

pytestmark = pytest.mark.usefixtures("only_toys")


ACT_ORDER = "gptqmodel-gptq-w4-g32-asym-descact"


def test_every_distinct_layer_is_measured_for_every_m(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    steps: list[tuple[str, int, int]] = []
    result = tuned(MODEL, file, progress=lambda *step: steps.append(step))
    assert not result.failures
    assert len(result.layers) == 5
    for layer in result.layers:
        n = layer.descriptor.n
        assert set(layer.measured) == {"fast", "slow"}
        for name, per_row in (("fast", 1e-6), ("slow", 3e-6)):
            for m in MIX:
                assert layer.measured[name].seconds[m] == pytest.approx(m * n * per_row, rel=1e-3)
        assert (layer.chosen, layer.estimate) == ("fast", "slow")
    assert {name for layer in result.layers for name in layer.layers} >= {
        "lm_head",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert steps[-1][1:] == (len(result.layers) * len(MIX),) * 2
    key = MachineKey.of(detect_platform())
    assert key is not None
    assert read(file) == {key: result.measurements}
    limits = result.measurements.limits
    declared = Platform.detect().limits
    assert limits == replace(declared, read=1.235e7), "instructions have rates of their own"


def test_loading_and_explain_choose_by_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tune.json"
    tuned(MODEL, file)

    def choices() -> set[tuple[str, str]]:
        with loaded(checkpoint(MODEL), "bfloat16"):
            return {(entry.backend, entry.chosen_by) for entry in PROCESS_PLAN.entries.values()}

    assert choices() == {("slow", "cost model")}
    monkeypatch.setenv(settings.TUNE_FILE, str(file))
    assert choices() == {("fast", "tuned")}
    found = explain(str(checkpoint(MODEL)), platform=detect_platform(), settings=Settings.read())
    parts = [part for layer in found.layers for part in layer.likely.parts]
    assert {(part.backend, part.chosen_by) for part in parts} == {("fast", "tuned")}
    monkeypatch.setenv(settings.BACKEND, "slow,unquantized=reference")
    assert choices() == {("slow", "asked for"), ("reference", "asked for")}


def test_a_file_of_other_threads_is_mentioned_once_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tune.json"
    tuned(MODEL, file)
    data = json.loads(file.read_text())
    data["machines"][0]["key"]["threads"] += 1
    file.write_text(json.dumps(data))
    monkeypatch.setenv(settings.TUNE_FILE, str(file))
    from vllm.compressed_linear.integration import preparation

    said: list[str] = []
    monkeypatch.setattr(preparation.logger, "warning", lambda text, *a: said.append(text % a))
    with loaded(checkpoint(MODEL), "bfloat16"):
        assert {entry.chosen_by for entry in PROCESS_PLAN.entries.values()} == {"cost model"}
    assert [line for line in said if "tune file" in line] == [
        measurements.load(str(file), detect_platform()).note
    ]
    assert "was made with threads" in said[0]
    found = explain(str(checkpoint(MODEL)), platform=detect_platform(), settings=Settings.read())
    assert said[0] in found.notes


def test_facts_of_the_data_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channel order and zero points are known only from the tensors, on every rank."""
    result = tuned(ACT_ORDER, tmp_path / "tune.json")
    orders = [layer.descriptor.channel_order is not None for layer in result.layers]
    assert orders.count(False) == 1  # lm_head
    monkeypatch.setenv(settings.TUNE_FILE, str(tmp_path / "tune.json"))
    with loaded(checkpoint(ACT_ORDER), "bfloat16"):
        assert {entry.chosen_by for entry in PROCESS_PLAN.entries.values()} == {"tuned"}


def test_all_ranks_are_measured(tmp_path: Path) -> None:
    result = tuned(ACT_ORDER, tmp_path / "tune.json", tp_size=2)
    wanted = set()
    for layer in explain(
        str(checkpoint(ACT_ORDER)),
        platform=detect_platform(),
        tp_size=2,
        read_weights=True,
        settings=Settings(),
    ).layers:
        for cases in (layer.cases, *(cases for _, cases in layer.other_ranks)):
            wanted |= {part.descriptor for part in cases[0].parts}
    assert {layer.descriptor for layer in result.layers} == wanted
    assert len(wanted) > 5


def test_only_the_named_backends(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    result = tuned(MODEL, file, only=["slow"])
    assert {name for layer in result.layers for name in layer.measured} == {"slow"}
    # What was measured goes before what was not.
    assert {layer.chosen for layer in result.layers} == {"slow"}
    again = tuned(MODEL, file, only=["fast"])
    assert {layer.chosen for layer in again.layers} == {"fast"}
    (found,) = read(file).values()
    assert {frozenset(backends) for backends in found.layers.values()} == {
        frozenset({"fast", "slow"})
    }
    named = tuned(MODEL, file, only=["reference"])
    assert {name for layer in named.layers for name in layer.measured} == {"reference"}


def test_reference_is_measured_where_it_is_alone(tmp_path: Path) -> None:
    registry.unregister_backend("fast")
    registry.unregister_backend("slow")
    result = tuned(MODEL, tmp_path / "tune.json")
    assert {name for layer in result.layers for name in layer.measured} == {"reference"}


def test_a_large_layer_is_cut_and_its_time_scaled(tmp_path: Path) -> None:
    few = Measuring(budget=0.0, cache_bytes=4096, now=lambda: Toy.now, matrix=16)
    result = tuned(MODEL, tmp_path / "tune.json", measuring=few)
    assert max(layer.descriptor.n for layer in result.layers) == 1024
    unit = tuning.ROW_UNIT * torch.get_num_threads()
    assert set(Toy.sizes) == {256, min(512, unit)}
    for layer in result.layers:
        expected = 16 * layer.descriptor.n * 1e-6
        assert layer.measured["fast"].seconds[16] == pytest.approx(expected, rel=1e-3)


def test_a_layer_is_rotated_until_it_leaves_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def apply(self: Toy, tensors: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        seen.append(tensors["codes"].data_ptr())
        return ReferenceBackend.apply(self, tensors, x, bias)

    monkeypatch.setattr(Fast, "apply", apply)
    descriptor = Case(uint(4, 8), 64, 64).build().descriptor
    able = tuning.candidates(descriptor, detect_platform(), ["fast"])
    now = iter(range(10**6))
    measuring = Measuring(budget=30, cache_bytes=8192, now=lambda: float(next(now)))
    tuning.measure_descriptor(descriptor, able, measuring)
    copies = len(set(seen))
    assert copies * 64 * 64 >= tuning.CACHE_MULTIPLE * 8192
    rounds = seen[1 : 1 + copies]  # after the self-check
    assert len(set(rounds)) == copies


def test_what_was_measured_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tune.json"
    measure = tuning.measure_descriptor
    done: list[Any] = []

    def interrupted(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[0])
        return measure(*arguments)

    monkeypatch.setattr(tuning, "measure_descriptor", interrupted)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        tuned(MODEL, file)
    (found,) = read(file).values()
    assert list(found.layers) == done
    assert torch.get_num_threads() == threads


def test_wrong_numbers_are_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Fast.apply
    monkeypatch.setattr(Fast, "apply", lambda *a: right(*a) * 1.5)
    with pytest.raises(SelfCheckError, match=saying("backend fast", "wrong")):
        tuned(MODEL, tmp_path / "tune.json")
    assert not (tmp_path / "tune.json").exists()


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    with pytest.raises(TuneError, match=saying("'fats'", "fast", "slow")):
        tuned(MODEL, file, only=["fats"])
    with pytest.raises(TuneError, match=saying("cuda:90")):
        tuned(MODEL, file, platform=Platform.parse("cuda:90"))
    file.write_text("{}")
    with pytest.raises(TuneFileError, match=saying("tune file")):
        tuned(MODEL, file)
    assert not Toy.sizes
    assert file.read_text() == "{}"
