# SPDX-License-Identifier: Apache-2.0
"""The prepared-weights cache: bad entries, and trouble with the directory."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cached_layers import prepared, shard, what_the_cache_did
from tests.support.messages import says
from tests.support.stored_entries import entries, equal
from vllm.compressed_linear.backends.cpu.weight_only import CpuBackend
from vllm.compressed_linear.backends.registry import register_backend
from vllm.compressed_linear.prepare.cache.store import PreparedCache
from vllm.compressed_linear.prepare.self_check import SelfCheckError
from vllm.compressed_linear.settings import BackendRules, Settings

# Bad entries.


def test_a_bad_entry_is_named_once_and_replaced(tmp_path: Path, warnings: list[str]) -> None:
    expected = prepared(PreparedCache(tmp_path)).tensors
    (file,) = entries(tmp_path)
    good = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(good[:-100] + bytes([good[-100] ^ 4]) + good[-99:])
    cache = PreparedCache(tmp_path)
    assert equal(prepared(cache).tensors, expected)
    assert what_the_cache_did() == "miss"
    assert len(warnings) == 1
    assert says(warnings[0], file, "damaged", "digest")
    assert equal(prepared(cache).tensors, expected)
    assert what_the_cache_did() == "hit"
    assert len(warnings) == 1


def test_an_entry_under_the_name_of_another_is_not_used(
    tmp_path: Path, warnings: list[str]
) -> None:
    prepared(PreparedCache(tmp_path), shard(1))
    (other,) = entries(tmp_path)
    prepared(PreparedCache(tmp_path))
    (file,) = (path for path in entries(tmp_path) if path != other)
    other.replace(file)
    assert equal(prepared(PreparedCache(tmp_path)).tensors, prepared(None).tensors)
    assert len(warnings) == 1
    assert says(warnings[0], file, "weights", "name")


def test_an_entry_that_computes_wrong_numbers_is_replaced(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound by its digest, as a faulty writer might leave it."""
    store = PreparedCache.store

    def wrong(self: PreparedCache, key: Any, layer: str, text: str, tensors: Any) -> bool:
        return store(self, key, layer, text, tensors | {"scale": tensors["scale"] * 2})

    with monkeypatch.context() as patch:
        patch.setattr(PreparedCache, "store", wrong)
        prepared(PreparedCache(tmp_path))
    assert equal(prepared(PreparedCache(tmp_path)).tensors, prepared(None).tensors)
    assert len(warnings) == 1
    assert says(warnings[0], "check")
    prepared(PreparedCache(tmp_path))
    assert what_the_cache_did() == "hit"


@pytest.mark.usefixtures("clean_registry")
def test_wrong_numbers_are_never_kept(tmp_path: Path) -> None:
    class Wrong(CpuBackend):
        name = "wrong"

        def prep_weights_for_execution(self, weights: Any) -> dict[str, torch.Tensor]:
            tensors = super().prep_weights_for_execution(weights)
            return tensors | {"scale": tensors["scale"] * 2}

    register_backend(Wrong)
    with pytest.raises(SelfCheckError):
        prepared(PreparedCache(tmp_path), settings=Settings(BackendRules.parse("wrong")))
    assert list(tmp_path.iterdir()) == []


# Trouble with the directory.


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Writing beyond ``limit`` bytes of a file fails, as on a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_warning_and_leaves_nothing(tmp_path: Path, warnings: list[str]) -> None:
    cache = PreparedCache(tmp_path)
    with small_files(2000):
        for seed in (0, 1):
            executor = prepared(cache, shard(seed))
            assert equal(executor.tensors, prepared(None, shard(seed)).tensors)
    assert list(tmp_path.iterdir()) == []
    assert len(warnings) == 1
    assert says(warnings[0], tmp_path, "[Errno 27] File too large")


def test_a_directory_that_cannot_be_one_is_one_warning(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "file").touch()
    cache = PreparedCache(tmp_path / "file" / "cache")
    for seed in (0, 1):
        prepared(cache, shard(seed))
    assert len(warnings) == 1
    assert "Not a directory" in warnings[0]


def test_a_directory_that_is_only_read_serves_what_it_has(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(PreparedCache(tmp_path))
    opened = os.open

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *args, **kwargs)

    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "open", read_only)
    cache = PreparedCache(tmp_path)
    did = []
    for seed in (0, 1, 2):
        prepared(cache, shard(seed))
        did.append(what_the_cache_did())
    assert did == ["hit", "miss", "miss"]
    assert len(warnings) == 1
    assert "Permission denied" in warnings[0]


def test_a_disk_that_cannot_be_read_is_a_bad_entry(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(PreparedCache(tmp_path))

    def fails(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    prepared(PreparedCache(tmp_path))
    assert what_the_cache_did() == "miss"
    assert "Input/output error" in warnings[0]


def test_a_directory_that_vanishes_is_one_warning(tmp_path: Path, warnings: list[str]) -> None:
    """What was mapped before stays; what comes later is prepared and not kept."""
    directory = tmp_path / "cache"
    prepared(PreparedCache(directory))
    cache = PreparedCache(directory)
    mapped = prepared(cache).tensors
    assert what_the_cache_did() == "hit"
    shutil.rmtree(directory)
    for seed in (0, 1, 2):
        assert equal(prepared(cache, shard(seed)).tensors, prepared(None, shard(seed)).tensors)
    assert equal(mapped, prepared(None).tensors)
    assert len(warnings) == 1
    assert says(warnings[0], directory, "No such file or directory")


@pytest.mark.parametrize("call", ["fsync", "fchmod", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_any_error_of_the_disk_is_one_warning_and_leaves_nothing(
    call: str,
    number: int,
    tmp_path: Path,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = PreparedCache(tmp_path)
    right = getattr(os, call)

    def fails(first: Any, *args: Any, **kwargs: Any) -> Any:
        if call == "open" and ".unfinished" not in str(first):
            return right(first, *args, **kwargs)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        for seed in (0, 1):
            assert equal(prepared(cache, shard(seed)).tensors, prepared(None, shard(seed)).tensors)
    assert list(tmp_path.iterdir()) == []
    assert len(warnings) == 1
    assert says(warnings[0], tmp_path, os.strerror(number))


def test_an_entry_that_cannot_be_mapped_is_prepared_again(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(PreparedCache(tmp_path))

    def fails(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("unable to mmap 4096 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "from_file", fails)
    cache = PreparedCache(tmp_path)
    assert equal(prepared(cache).tensors, prepared(None).tensors)
    assert len(warnings) == 1
    assert says(warnings[0], "unable to mmap")


@pytest.mark.parametrize("length", [0, 1, 15, 16, 40, -1])
def test_a_truncated_entry_is_prepared_again(
    length: int, tmp_path: Path, warnings: list[str]
) -> None:
    expected = prepared(PreparedCache(tmp_path)).tensors
    (file,) = entries(tmp_path)
    good = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(good[:length])
    assert equal(prepared(PreparedCache(tmp_path)).tensors, expected)
    assert len(warnings) == 1
    (file,) = entries(tmp_path)
    assert len(file.read_bytes()) == len(good)
