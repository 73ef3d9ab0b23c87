# SPDX-License-Identifier: Apache-2.0
"""From rates to profiles, and the file that keeps them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.messages import saying
from vllm.compressed_linear.machine import native, rates, rates_file, this_cpu
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.machine.profiles import PROFILES, Profile
from vllm.compressed_linear.machine.rates_file import RatesFileError, RatesKey
from vllm.compressed_linear.settings import CPU_PROFILE, TUNE_FILE, rates_path

KEY = RatesKey("a processor", "1.0")
RATES = {"clock": 3e9, "fma512": 2.0}


def of(profile: Profile, **changes: float) -> dict[str, float]:
    """What a measurement on such a processor would give."""
    found = {name: rate.value for name, rate in profile.rates if name != "scalar"}
    return found | {"clock": profile.clock} | changes


@pytest.mark.parametrize("name", PROFILES)
def test_a_processor_with_the_rates_of_a_profile_gets_that_or_its_like(name: str) -> None:
    profile = PROFILES[name]
    cpu = f"x, {profile.known_as[0]}" if profile.known_as else "x"
    found = rates.fitted(of(profile), cpu, profile.machine, profile.features)
    if profile.known_as:
        assert found.name == name
    assert found.changed == ()
    for instruction, rate in profile.rates:
        assert found.rate(instruction) == pytest.approx(rate.value, rel=0.25)


def test_rates_and_not_flags_decide_among_processors_of_equal_features() -> None:
    zen4, zen5 = PROFILES["zen4"], PROFILES["zen5"]
    shared = zen4.features
    assert rates.fitted(of(zen4), "x", "x86_64", shared).name == "zen4"
    fast = {name: rate for name, rate in of(zen5).items() if name != "dot8_256"}
    assert rates.fitted(fast, "x", "x86_64", shared).name == "zen5"
    slow = of(zen4, fma512=2.0, dotbf16_512=0.5, dot8_512=2.0)
    assert rates.fitted(slow, "x", "x86_64", shared).rate("dotbf16_512") == pytest.approx(0.5)


def test_small_differences_change_nothing_and_large_ones_in_steps() -> None:
    zen4 = PROFILES["zen4"]
    cpu = f"x, {zen4.known_as[0]}"

    def dots(measured: float) -> float:
        found = rates.fitted(of(zen4, dotbf16_512=measured), cpu, "x86_64", zen4.features)
        assert found.name == "zen4"
        assert found.changed == (() if found.rates == zen4.rates else ("dotbf16_512",))
        return found.rate("dotbf16_512")

    assert dots(0.94 * 1.2) == dots(0.94 / 1.2) == 0.94
    assert dots(0.47) == pytest.approx(0.47, rel=0.05)
    assert dots(0.47) == dots(0.47 * 1.02) == dots(0.47 / 1.02)
    assert dots(0.47) < dots(0.6)


def test_a_processor_that_no_profile_fits_gets_the_plain_one_of_its_features() -> None:
    found = rates.fitted({"fma256": 0.5}, "x", "x86_64", frozenset({"avx2", "fma9"}))
    assert found.name == "avx2"
    assert found.rate("fma256") == pytest.approx(0.5, rel=0.05)


def test_rates_are_measured_once(tmp_path: Path) -> None:
    file, calls = tmp_path / "new" / "rates.json", []

    def measure() -> dict[str, float]:
        calls.append(1)
        return RATES | {"fma512": 2.0 / len(calls)}

    first = rates_file.kept(file, KEY, measure)
    assert rates_file.kept(file, KEY, measure) == first == RATES
    assert len(calls) == 1
    other = RatesKey("another", "1.0")
    assert rates_file.kept(file, other, measure)["fma512"] == 1.0
    assert rates_file.read(file) == {KEY: RATES, other: RATES | {"fma512": 1.0}}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": "another", "version": 1}']
    + [
        json.dumps({"format": rates_file.FORMAT, "version": 1, "machines": machines})
        for machines in ([{}], [{"cpu": "a", "package": "1", "rates": {"clock": 0}}], 5)
    ],
)
def test_a_damaged_file_is_replaced(text: str, tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(text)
    with pytest.raises(RatesFileError, match=saying(str(file))):
        rates_file.read(file)
    assert rates_file.kept(file, KEY, lambda: RATES) == RATES
    assert rates_file.read(file) == {KEY: RATES}


START = """
import random, sys
from pathlib import Path
from vllm.compressed_linear.machine import rates_file
key = rates_file.RatesKey("a processor", "1.0")
sys.stdin.readline()
print(dict(rates_file.kept(Path(sys.argv[1]), key, lambda: {"clock": random.uniform(1e9, 4e9)})))
"""


def test_processes_that_start_together_read_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-c", START, str(tmp_path / "rates.json")]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = {process.communicate()[0] for process in processes}
    assert len(found) == 1
    assert "clock" in found.pop()


needs_library = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has chosen nothing yet."""
    monkeypatch.delenv(CPU_PROFILE, raising=False)
    this_cpu._found.cache_clear()


@needs_library
@pytest.mark.usefixtures("fresh")
def test_two_starts_choose_the_same_whatever_they_would_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TUNE_FILE, str(tmp_path / "tune.json"))
    here = Platform.detect()
    assert "measured here" in here.rates.origin
    assert (tmp_path / "rates.json").is_file()
    this_cpu._found.cache_clear()
    slow = {name: rate / 3 for name, rate in rates.measure().items()}
    monkeypatch.setattr(rates, "measure", lambda: slow)
    assert Platform.detect() == here
    (tmp_path / "rates.json").unlink()
    this_cpu._found.cache_clear()
    assert Platform.detect().rates.clock < here.rates.clock / 2


@needs_library
@pytest.mark.usefixtures("fresh")
def test_where_rates_cannot_be_kept_the_published_profile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(TUNE_FILE, str(tmp_path / "file" / "tune.json"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        here = Platform.detect()
        assert Platform.detect() == here
    assert "published" in here.rates.origin
    assert here.rates.name == this_cpu.published(here.cpu, here.machine, here.features).name
    # By identity: vLLM's logger may hand the record to two handlers.
    lines = {id(r) for r in caplog.records if "published profile" in r.getMessage()}
    assert len(lines) == 1


@pytest.mark.usefixtures("fresh")
def test_without_a_tune_file_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TUNE_FILE, "off")
    monkeypatch.setattr(rates, "measure", lambda: pytest.fail("measured"))
    assert rates_path() is None
    assert "published" in Platform.detect().rates.origin
