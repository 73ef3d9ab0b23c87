# SPDX-License-Identifier: Apache-2.0
"""The file of measurements: what is kept, what counts here, and what damage does to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.messages import saying, says
from vllm.compressed_linear.backends import measurements as tune_file
from vllm.compressed_linear.backends.measurements import (
    MachineKey,
    Measured,
    Measurements,
    TuneFileError,
    load,
    merge,
    read,
)
from vllm.compressed_linear.machine import atomic_file
from vllm.compressed_linear.machine.cost import MIX
from vllm.compressed_linear.machine.limits import MachineLimits
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.settings import default_tune_file
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import uint

WEIGHT = WeightSpec(uint(4, 8), ScaleSpec("bfloat16", "group", 32))
DESCRIPTOR = CompressedLinearDescriptor(128, 64, WEIGHT, "bfloat16", "bfloat16")
LIMITS = MachineLimits(1e9, 2e9, 3e9, 4e9)
HERE = Platform("cpu", cpu="Test CPU", threads=2)


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    tune_file._load.cache_clear()


def key(platform: Platform = HERE) -> MachineKey:
    found = MachineKey.of(platform)
    assert found is not None
    return found


def measured(seconds: float) -> Measured:
    return Measured("avx2", {m: m * seconds for m in MIX}, dict.fromkeys(MIX, 0.02))


def of(**backends: float) -> Measurements:
    return Measurements(LIMITS, {DESCRIPTOR: {n: measured(s) for n, s in backends.items()}})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "directory" / "tune.json"
    merge(file, key(), of(cpu=1e-3, other=2e-3))
    assert read(file) == {key(): of(cpu=1e-3, other=2e-3)}
    assert [path.name for path in file.parent.iterdir()] == ["tune.json"]
    text = file.read_text()
    assert str(DESCRIPTOR) in json.loads(text)["machines"][0]["layers"][0]["layer"]
    assert max(map(len, text.splitlines())) < 120


def test_the_expected_time_is_that_of_the_mix() -> None:
    assert measured(1.0).expected == pytest.approx(sum(m * share for m, share in MIX.items()))


def test_new_measurements_join_the_old(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    merge(file, key(), of(cpu=1e-3, other=2e-3))
    merge(file, key(), of(cpu=5e-3, third=3e-3))
    wider = replace(DESCRIPTOR, in_features=256)
    merge(file, key(), Measurements(None, {wider: {"cpu": measured(1.0)}}))
    elsewhere = key(replace(HERE, threads=8))
    merge(file, elsewhere, of(cpu=1e-4))
    found = read(file)
    assert found[key()].layers == {
        **of(cpu=5e-3, other=2e-3, third=3e-3).layers,
        wider: {"cpu": measured(1.0)},
    }
    assert found[key()].limits == LIMITS
    assert found[elsewhere] == of(cpu=1e-4)


def test_measurements_are_found_by_the_descriptor() -> None:
    assert of(cpu=1.0).of(replace(DESCRIPTOR)).keys() == {"cpu"}
    assert not of(cpu=1.0).of(replace(DESCRIPTOR, input_dtype="float16"))


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tune.json"
    merge(file, key(), of(cpu=1e-3))
    before = file.read_text()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(atomic_file.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        merge(file, key(), of(cpu=2e-3))
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["tune.json"]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[object, ...]]] = {
    "cut off": (lambda data: json.dumps(data)[:-20], ("JSON",)),
    "another file": (lambda data: json.dumps({"layers": []}), ("tune file",)),
    "a list": (lambda data: "[]", ("tune file",)),
    "a later version": (lambda data: data.update(version=3), ("version", 3, 2)),
    "an earlier version": (lambda data: data.update(version=1), ("version", 1, 2)),
    "no key": (lambda data: data["machines"][0].pop("key"), ("KeyError", "'key'")),
    "threads in words": (
        lambda data: data["machines"][0]["key"].update(threads="two"),
        ("key.threads", "'two'", "int"),
    ),
    "an unknown limit": (
        lambda data: data["machines"][0]["limits"].update(int4=1.0),
        ("TypeError",),
    ),
    "no descriptor": (
        lambda data: data["machines"][0]["layers"][0].pop("descriptor"),
        ("KeyError",),
    ),
    "half a descriptor": (
        lambda data: data["machines"][0]["layers"][0]["descriptor"].pop("weight"),
        ("KeyError",),
    ),
    "a missing M": (
        lambda data: data["machines"][0]["layers"][0]["backends"]["cpu"]["seconds"].pop("64"),
        ("KeyError", "'64'"),
    ),
    "a negative time": (
        lambda data: data["machines"][0]["layers"][0]["backends"]["cpu"]["seconds"].update(
            {"1": -1}
        ),
        ("-1.0",),
    ),
    "no machines": (lambda data: data.update(machines=3), ("TypeError",)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_ignored_in_serving_and_never_overwritten(
    damage: str, tmp_path: Path
) -> None:
    file = tmp_path / "tune.json"
    merge(file, key(), of(cpu=1e-3))
    data = json.loads(file.read_text())
    change, message = DAMAGE[damage]
    changed = change(data)
    text = changed if isinstance(changed, str) else json.dumps(data)
    file.write_text(text)
    with pytest.raises(TuneFileError, match=saying(file)) as caught:
        read(file)
    assert says(str(caught.value), *message)
    found = load(str(file), HERE)
    assert found.measurements == Measurements()
    assert found.note == f"{caught.value}; it is not used"
    with pytest.raises(TuneFileError):
        merge(file, key(), of(cpu=2e-3))
    assert file.read_text() == text


def test_what_counts_here(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    merge(file, key(replace(HERE, threads=7)), of(cpu=7.0))
    merge(file, key(), of(cpu=1.0))
    assert load(str(file), HERE) == tune_file.Tuned(of(cpu=1.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cpu": "Other CPU"}, "cpu 'Other CPU' (here 'Test CPU')"),
        ({"threads": 4}, "threads 4 (here 2)"),
        ({"isa": "avx9"}, "isa 'avx9' (here '')"),
        ({"package": "0.0.1"}, "package '0.0.1' (here '"),
        ({"torch": "1.0", "vllm": "0.1"}, "torch '1.0' (here '"),
        ({"layout": "tile8"}, "layout 'tile8' (here '')"),
    ],
)
def test_what_was_measured_elsewhere_is_ignored_and_named(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "tune.json"
    merge(file, replace(key(), **change), of(cpu=1.0))
    merge(file, replace(key(), cpu="a", isa="b", torch="c", layout="d", threads=9), of(cpu=1.0))
    found = load(str(file), HERE)
    assert found.measurements == Measurements()
    assert found.note.startswith(f"tune file {file} is not used: it was made with {words}")
    assert len(found.note.split(" (here ")) == len(change) + 1


def test_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load("", HERE) == load(str(default_tune_file()), HERE) == tune_file.Tuned()
    named = str(tmp_path / "named.json")
    assert load(named, HERE).note == f"tune file {named} does not exist"


@pytest.mark.parametrize("name", ["cpu:avx512bf16", "cuda:90"])
def test_machines_that_are_not_here_have_no_measurements(name: str, tmp_path: Path) -> None:
    platform = Platform.parse(name)
    assert MachineKey.of(platform) is None
    assert load(str(tmp_path / "named.json"), platform) == tune_file.Tuned()


def test_one_process_sees_one_state_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tune.json"
    merge(file, key(), of(cpu=1.0))
    before = load(str(file), HERE)
    merge(file, key(), of(cpu=2.0))
    assert load(str(file), HERE) == before


def test_this_machine_has_a_name() -> None:
    assert key(Platform.detect()).cpu
