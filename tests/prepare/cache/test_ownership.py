# SPDX-License-Identifier: Apache-2.0
"""Prepared weights that another user could have written are not used, and no other reads ours."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.support.cached_layers import prepared, what_the_cache_did
from tests.support.messages import says
from tests.support.stored_entries import entries, equal
from vllm.compressed_linear.prepare.cache import ownership
from vllm.compressed_linear.prepare.cache.store import PreparedCache


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> Any:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_umask")
def test_directory_and_files_are_their_owners_only(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    prepared(PreparedCache(directory))
    (file,) = entries(directory)
    assert mode(directory) == 0o700
    assert mode(file) == 0o400


@pytest.mark.usefixtures("open_umask")
def test_an_unfinished_file_is_its_owners_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        modes.append(mode(self))
        return replace(self, target)

    monkeypatch.setattr(os, "fchmod", lambda descriptor, mode: None)
    monkeypatch.setattr(Path, "replace", watched)
    prepared(PreparedCache(tmp_path / "cache"))
    assert modes == [0o600]


@pytest.mark.parametrize("bits", [0o777, 0o1777, 0o757, 0o770, 0o720])
def test_a_directory_that_others_can_write_to_is_not_used(
    bits: int, tmp_path: Path, warnings: list[str]
) -> None:
    expected = prepared(PreparedCache(tmp_path)).tensors
    tmp_path.chmod(bits)
    before = [file.read_bytes() for file in entries(tmp_path)]
    cache = PreparedCache(tmp_path)
    for _ in range(2):
        assert equal(prepared(cache).tensors, expected)
        assert what_the_cache_did() == "miss"
    assert [file.read_bytes() for file in entries(tmp_path)] == before
    assert len(warnings) == 1
    assert says(warnings[0], tmp_path, f"{bits:o}", "owner only", "chmod go-w")


@pytest.mark.parametrize("bits", [0o700, 0o750, 0o755, 0o2755, 0o500])
def test_a_directory_that_others_only_read_is_used(bits: int, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    prepared(PreparedCache(tmp_path))
    tmp_path.chmod(bits)
    prepared(PreparedCache(tmp_path))
    assert what_the_cache_did() == "hit"


def test_a_file_that_others_can_write_to_is_replaced(tmp_path: Path, warnings: list[str]) -> None:
    expected = prepared(PreparedCache(tmp_path)).tensors
    (file,) = entries(tmp_path)
    file.chmod(0o666)
    assert equal(prepared(PreparedCache(tmp_path)).tensors, expected)
    assert what_the_cache_did() == "miss"
    assert says(warnings[0], file, "666", "owner only")
    assert mode(file) == 0o400
    prepared(PreparedCache(tmp_path))
    assert what_the_cache_did() == "hit"


def test_a_directory_of_another_user_is_not_used(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests cannot make one without being root, so this process takes another name."""
    prepared(PreparedCache(tmp_path))
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    found = os.stat_result((0o40700, 0, 0, 0, owner or 7, 0, 0, 0, 0, 0))
    assert says(ownership.fault_of(found), owner or 7, owner + 1)
    if owner:
        prepared(PreparedCache(tmp_path))
        assert what_the_cache_did() == "miss"
        assert says(warnings[0], tmp_path, owner, owner + 1)


def test_the_directory_of_root_may_serve_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert ownership.fault_of(os.stat_result((0o40755, 0, 0, 0, 0, 0, 0, 0, 0, 0))) == ""
