# SPDX-License-Identifier: Apache-2.0
"""Available memory: of the host, and of a control group that allows less."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vllm.compressed_linear.machine import memory

HOST = "MemTotal: 4000 kB\nMemFree: 1000 kB\nMemAvailable: 3000 kB\n"
HOST_BYTES = 3000 << 10


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text(HOST)
    return tmp_path


def _limit(system: Path, limit: str) -> None:
    (system / "memory.max").write_text(f"{limit}\n")
    (system / "memory.current").write_text("700000\n")
    (system / "memory.stat").write_text("anon 400000\ninactive_file 200000\n")


def test_the_host_s_available_memory(system: Path) -> None:
    assert memory.available_bytes() == HOST_BYTES


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", HOST_BYTES), ("1000000", 1000000 - 700000 + 200000), ("9999999999", HOST_BYTES)],
)
def test_a_control_group_may_allow_less(system: Path, limit: str, expected: int) -> None:
    _limit(system, limit)
    assert memory.available_bytes() == expected


def test_a_system_that_does_not_tell_sets_no_limit(system: Path) -> None:
    (system / "meminfo").unlink()
    assert memory.available_bytes() == sys.maxsize


def test_this_machine_has_some() -> None:
    assert memory.available_bytes() > 1 << 20
