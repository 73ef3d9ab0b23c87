# SPDX-License-Identifier: Apache-2.0
"""``vllm-compressed-linear cache ls | verify | prune``."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.cached_layers import prepared, shard, what_the_cache_did
from tests.support.messages import says
from vllm.compressed_linear import settings
from vllm.compressed_linear.commands.cache import age
from vllm.compressed_linear.commands.cli import app
from vllm.compressed_linear.commands.text import size
from vllm.compressed_linear.prepare.cache import store as cache_module
from vllm.compressed_linear.prepare.cache.inventory import parse_age, parse_bytes, read_cache
from vllm.compressed_linear.prepare.cache.store import SUFFIX, UNFINISHED, PreparedCache

DAY = 86400.0


def call(*arguments: str, columns: int = 100, **environment: str) -> Result:
    variables = {"COLUMNS": str(columns), settings.CACHE: "", **environment}
    return CliRunner().invoke(app, ["cache", *arguments], env=variables)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Three entries of one model, not used for 0, 1 and 2 days, and a file of somebody else."""
    path = tmp_path / "cache"
    cache = PreparedCache(path, "models/small")
    for number in range(3):
        prepared(cache, shard(number), name=f"model.layers.{number}.mlp.down_proj")
    for found in read_cache(path):
        assert found.entry is not None
        number = int(found.entry.label.layer.split(".")[2])
        os.utime(found.path, (time.time(), time.time() - number * DAY))
    (path / "notes.txt").write_text("not ours")
    return path


def entry_of(directory: Path, number: int) -> Path:
    (path,) = (
        found.path
        for found in read_cache(directory)
        if found.entry is not None and f".{number}." in found.entry.label.layer
    )
    return path


def layers(directory: Path) -> list[int]:
    """Numbers of the layers that are left, least recently used first."""
    found = [entry.entry for entry in read_cache(directory)]
    return [int(entry.label.layer.split(".")[2]) for entry in found if entry is not None]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.chmod(0o644)
    used = path.stat().st_mtime
    path.write_bytes(content)
    os.utime(path, (used, used))


# ls


@pytest.mark.parametrize("columns", [60, 100])
def test_like_layers_are_one_line(columns: int, directory: Path) -> None:
    result = call("ls", "--dir", str(directory), columns=columns)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    text = "".join(result.stdout.split())
    assert "models/small" in text
    if columns == 100:
        assert "model.layers.{0-2}.mlp.down_proj" in text
    total = sum(found.nbytes for found in read_cache(directory))
    assert lines[-1] == f"3 entries, {total / 1024:.1f} KiB"


def test_json_has_what_is_known_of_each_entry(directory: Path) -> None:
    result = call("ls", "--dir", str(directory), "--json")
    data = json.loads(result.stdout)
    assert [entry["layer"].split(".")[2] for entry in data] == ["2", "1", "0"]
    first = data[0]
    path = entry_of(directory, 2)
    assert first["file"] == str(path)
    assert first["bytes"] == path.stat().st_size
    assert first["model"] == "models/small"
    assert (first["backend"], first["foreign"]) == ("cpu", False)
    assert first["descriptor"].startswith("80x128, uint4")
    assert abs(time.time() - first["used"] - 2 * DAY) < 60
    assert abs(time.time() - first["created"]) < 60


def test_the_environment_names_the_directory(directory: Path) -> None:
    assert call("ls", **{settings.CACHE: str(directory)}).stdout.endswith(" KiB\n")


def test_a_read_is_a_use(directory: Path) -> None:
    prepared(PreparedCache(directory), shard(2))
    assert what_the_cache_did() == "hit"
    assert layers(directory) == [1, 0, 2]


def test_entries_of_other_versions_and_files_that_are_none_are_told(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / f"abc{SUFFIX}").write_text("something else")
    monkeypatch.setattr(cache_module, "installation", lambda: "9.9+1")
    prepared(PreparedCache(directory), shard(5), name="model.layers.5.mlp.down_proj")
    monkeypatch.undo()
    text = call("ls", "--dir", str(directory)).stdout
    assert says(text, "another", "version")
    assert "begins with" in " ".join(text.split())
    foreign = json.loads(call("ls", "--dir", str(directory), "--json").stdout)
    assert sorted(entry["foreign"] for entry in foreign) == [False] * 3 + [True] * 2


@pytest.mark.parametrize("command", [("ls",), ("verify",), ("prune", "--all")])
def test_no_directory_is_one_line_and_status_1(command: tuple[str, ...], tmp_path: Path) -> None:
    result = call(*command)
    assert result.exit_code == 1
    assert result.stderr == f"error: which directory? Give --dir, or set {settings.CACHE}\n"
    result = call(*command, "--dir", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert result.stderr == f"error: directory {tmp_path / 'none'} does not exist\n"


def test_an_empty_cache(tmp_path: Path) -> None:
    assert call("ls", "--dir", str(tmp_path)).stdout == "0 entries, 0 B\n"
    assert call("ls", "--dir", str(tmp_path), "--json").stdout == "[]\n"
    assert call("verify", "--dir", str(tmp_path)).exit_code == 0


# verify


def test_sound_entries_verify(directory: Path) -> None:
    before = [found.used for found in read_cache(directory)]
    result = call("verify", "--dir", str(directory))
    assert (result.exit_code, result.stdout) == (0, "3 entries read, 0 of them damaged\n")
    assert [found.used for found in read_cache(directory)] == before


def test_the_damaged_ones_are_named(directory: Path) -> None:
    damage(entry_of(directory, 1))
    (directory / f"abc{SUFFIX}").write_text("something else")
    result = call("verify", "--dir", str(directory))
    assert (result.exit_code, result.stdout) == (1, "4 entries read, 2 of them damaged\n")
    assert len(result.stderr.splitlines()) == 2
    assert says(result.stderr, "error", entry_of(directory, 1), "damaged", "digest")
    assert says(result.stderr, "error", directory / f"abc{SUFFIX}")


# prune


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--older-than", "36h"], [1, 0]),
        (["--older-than", "3d"], [2, 1, 0]),
        (["--older-than", "0s"], []),
        (["--max-bytes", "ONE"], [0]),
        (["--max-bytes", "TWO"], [1, 0]),
        (["--max-bytes", "0"], []),
        (["--max-bytes", "1G"], [2, 1, 0]),
        (["--foreign"], [2, 1, 0]),
        (["--foreign", "--older-than", "36h", "--max-bytes", "ONE"], [0]),
        (["--all"], []),
    ],
)
def test_what_the_options_remove(options: list[str], left: list[int], directory: Path) -> None:
    largest = max(found.nbytes for found in read_cache(directory))
    sizes = {"ONE": str(largest), "TWO": str(2 * largest)}
    before = {found.path: found.nbytes for found in read_cache(directory)}
    result = call("prune", "--dir", str(directory), *(sizes.get(o, o) for o in options))
    assert result.exit_code == 0, result.output
    assert layers(directory) == left
    removed = sum(n for path, n in before.items() if not path.exists())
    assert result.stdout == f"{3 - len(left)} files removed, {size(removed)}\n"
    assert (directory / "notes.txt").exists()


def test_foreign_entries_are_those_no_server_here_can_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / f"abc{SUFFIX}").write_text("something else")
    monkeypatch.setattr(cache_module, "installation", lambda: "9.9+1")
    prepared(PreparedCache(directory), shard(5), name="model.layers.5.mlp.down_proj")
    monkeypatch.undo()
    assert call("prune", "--dir", str(directory), "--foreign").stdout.startswith("2 files removed")
    assert layers(directory) == [2, 1, 0]


def test_a_file_that_is_being_written_stays(directory: Path) -> None:
    writing = directory / f".abc{SUFFIX}.1{UNFINISHED}"
    left = directory / f".abc{SUFFIX}.2{UNFINISHED}"
    left.write_bytes(b"half")
    with writing.open("xb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert call("prune", "--dir", str(directory), "--all").stdout.startswith("4 files removed")
        assert writing.exists()
        assert not left.exists()
    assert call("prune", "--dir", str(directory), "--all").stdout == "1 files removed, 0 B\n"


def test_a_writer_whose_file_was_pruned_writes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the moments when a writer makes its file and locks it, nobody knows whose it is."""
    lock, pruned = fcntl.flock, []

    def late(stream: object, how: int) -> None:
        if not pruned:
            pruned.append(1)
            assert call("prune", "--dir", str(tmp_path), "--all").stdout == "1 files removed, 0 B\n"
        lock(stream, how)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module.fcntl, "flock", late)
    prepared(PreparedCache(tmp_path))
    assert len(read_cache(tmp_path)) == len(list(tmp_path.iterdir())) == 1


def test_prune_must_be_told_what(directory: Path) -> None:
    result = call("prune", "--dir", str(directory))
    assert result.exit_code == 1
    assert says(result.stderr, "error", "--older-than")
    for options in (["--older-than", "soon"], ["--max-bytes", "much"]):
        result = call("prune", "--dir", str(directory), *options)
        assert result.exit_code == 1
        assert "examples:" in result.stderr
    assert layers(directory) == [2, 1, 0]


# Sizes and ages.


def test_sizes_and_ages() -> None:
    assert [parse_bytes(t) for t in ("0", "1500", "2k", "1.5GiB", "3 MB", "1T")] == [
        0,
        1500,
        2048,
        3 << 29,
        3 << 20,
        1 << 40,
    ]
    assert [parse_age(t) for t in ("90s", "1.5m", "2h", "1d", "2w")] == [
        90,
        90,
        7200,
        86400,
        2 * 7 * 86400,
    ]
    for text in ("", "-1", "1x", "1e3", "k"):
        with pytest.raises(ValueError, match="examples"):
            parse_bytes(text)
        with pytest.raises(ValueError, match="examples"):
            parse_age(text)
    assert [age(s) for s in (0, 59, 60, 7300, 90000.0)] == ["0 s", "59 s", "1 min", "2 h", "1 d"]
