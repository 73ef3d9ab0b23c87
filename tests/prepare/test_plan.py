# SPDX-License-Identifier: Apache-2.0
"""The plan's own book-keeping."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from weakref import ref

import pytest

from tests.support.messages import says
from vllm.compressed_linear.backends.vllm_native.classes.mixed_precision import ROUNDS_X
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare import plan as plan_module
from vllm.compressed_linear.prepare.plan import (
    Plan,
    PlanEntry,
    Rejection,
    disagreements,
    rounding_note,
)

ENTRY = PlanEntry(
    name="model.layers.0.mlp.down_proj",
    kind="linear",
    backend="cpu",
    variant="avx2",
    descriptor="64x64, uint4b8",
    bytes_checkpoint=1 << 20,
    bytes_prepared=2 << 20,
    prepare_seconds=0.25,
    rejected=(Rejection("vllm_native", ("3-bit integer weights",)), Rejection("reference")),
)


def test_the_fingerprint_follows_what_graphs_depend_on_and_nothing_else() -> None:
    plan = Plan()
    plan.add(ENTRY)
    before = plan.fingerprint()
    # The instruction sets that calls take are in no graph, and another start may choose others.
    plan.add(replace(ENTRY, prepare_seconds=9.0, bytes_prepared=1, variant="avx512 to M=8, amx"))
    assert plan.fingerprint() == before
    for change in ({"backend": "reference"}, {"prepared_variant": "b"}, {"descriptor": "other"}):
        plan.add(replace(ENTRY, **change))
        assert plan.fingerprint() != before


ROUNDS = f"{ROUNDS_X} (set VLLM_CPU_INT4_W4A8=0)"


@pytest.mark.parametrize(
    ("choices", "layers"),
    [
        ([("cpu", ("vllm_native", (ROUNDS,)))], 1),
        ([("cpu", ("vllm_native", (ROUNDS,)))] * 3, 3),
        ([("cpu", ("vllm_native", ("3-bit integer weights", ROUNDS)))], 0),
        ([("cpu", ("vllm_native", ()))], 0),
        ([("cpu_int8_fast", ("vllm_native", (ROUNDS,)))], 0),
        ([], 0),
    ],
)
def test_the_option_is_named_that_rounds_x_as_vllm_would(
    choices: list[tuple[str, tuple[str, tuple[str, ...]]]], layers: int
) -> None:
    note = rounding_note((backend, [Rejection(*other)]) for backend, other in choices)
    assert bool(note) == bool(layers)
    if layers:
        assert says(note, layers, "8 bits", "VLLM_COMPRESSED_LINEAR_BACKEND=cpu_int8_fast")
        assert "\n" not in note


def test_the_file_says_by_which_rates_instruction_sets_are_chosen() -> None:
    plan = Plan(platform=Platform.parse("cpu:sapphirerapids"))
    machine = plan.to_json()["machine"]
    assert machine["profile"]["name"] == "sapphirerapids"
    assert machine["profile"]["rates"]["tile_bf16"] == pytest.approx(1 / 16)
    assert "profile" not in Plan(platform=Platform.parse("cuda:90")).to_json()["machine"]


def test_parts_of_a_layer_are_entries_of_their_own() -> None:
    plan = Plan()
    plan.add(ENTRY, 0)
    plan.add(replace(ENTRY, backend="reference", variant=""), 1)
    assert plan.summary().startswith("2 layers: 1 on cpu (avx2), 1 on reference;")


def test_the_summary_says_how_many_layers_the_cache_had() -> None:
    plan = Plan()
    plan.add(ENTRY)
    assert plan.summary().endswith(" in 0.25 s")
    plan.add(replace(ENTRY, cache="miss"))
    assert plan.summary().endswith(" in 0.25 s, 0 from the cache")
    plan.add(replace(ENTRY, cache="hit"), 1)
    plan.add(replace(ENTRY, cache="not kept"), 2)
    assert plan.summary().endswith(" in 0.75 s, 1 from the cache")


def test_the_file_holds_every_rejection_with_its_reasons(tmp_path: Path) -> None:
    plan = Plan()
    plan.plan_file = str(tmp_path / "plan.json")
    plan.add(ENTRY)
    plan.write()
    layer = json.loads((tmp_path / "plan.json").read_text())["layers"][0]
    assert layer["rejected"][0] == {
        "backend": "vllm_native",
        "reasons": ["3-bit integer weights"],
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_a_plan_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan()
    plan.plan_file = str(tmp_path / "plan.json")
    plan.add(ENTRY)
    plan.write()
    before = (tmp_path / "plan.json").read_text()

    def full(self: Path, text: str) -> int:
        with self.open("w") as stream:
            stream.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        plan.write()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_text() == before


def test_other_ranks_write_files_of_their_own(tmp_path: Path) -> None:
    for rank in range(2):
        plan = Plan()
        plan.plan_file, plan.rank = str(tmp_path / "plan.json"), rank
        plan.write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.rank1.json"]


class Layer:
    """Stands for one of vLLM's."""


def test_a_drafter_s_layer_is_removed_when_only_it_is_dropped(tmp_path: Path) -> None:
    target = Plan()
    plan = target.drafter("drafter")
    plan.plan_file = str(tmp_path / "plan.json")
    plan.add(ENTRY)
    plan.add(replace(ENTRY, name="lm_head"))
    target.add(replace(ENTRY, name="lm_head"))
    before, model = target.fingerprint(), Layer()
    plan.owner = ref(model)
    plan.remove("lm_head")
    assert [e.name for e in plan.entries.values()] == [ENTRY.name]
    assert [e.name for e in target.entries.values()] == ["lm_head"]
    assert target.fingerprint() != before
    (written,) = json.loads((tmp_path / "plan.json").read_text())["drafters"]
    assert [e["name"] for e in written["layers"]] == [ENTRY.name]
    del model
    plan.remove(ENTRY.name)
    assert len(plan.entries) == 1, "the whole model is gone, not a layer of it"


@pytest.mark.parametrize("large", [False, True])
def test_a_progress_bar_for_large_models_only(
    large: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan()
    plan.open("")
    plan.begin(3, plan_module.PROGRESS_FROM_BYTES if large else 1000)
    for _ in range(3):
        plan.layer_finished()
    assert plan.is_open
    plan.end()
    assert not plan.is_open
    assert plan.prepared == plan.expected == 3
    assert ("Preparing weights" in capsys.readouterr().err) == large


def test_ranks_that_choose_differently_are_named_by_layer() -> None:
    one, two = Plan(), Plan()
    one.add(ENTRY)
    two.add(replace(ENTRY, backend="reference", variant=""))
    assert disagreements([one.choices(), one.choices()]) == []
    assert disagreements([one.choices(), two.choices()]) == [
        "model.layers.0.mlp.down_proj: rank 0 runs ['cpu (avx2)'], rank 1 ['reference']"
    ]
