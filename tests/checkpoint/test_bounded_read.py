# SPDX-License-Identifier: Apache-2.0
"""Files of a stranger: what is read, and what is refused by one error."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.support.messages import saying, says
from vllm.compressed_linear.checkpoint.bounded_read import (
    MAX_JSON_BYTES,
    parse_json,
    read_json_file,
    regular_file,
)
from vllm.compressed_linear.checkpoint.headers import INDEX, read_headers
from vllm.compressed_linear.checkpoint.shard import CheckpointError


@pytest.mark.parametrize("name", ["model.safetensors", INDEX])
def test_a_file_beyond_the_limit_is_not_read(name: str, tmp_path: Path) -> None:
    """A sparse file, which takes no room on the disk."""
    file = tmp_path / name
    size = MAX_JSON_BYTES + 100
    with file.open("wb") as stream:
        if name != INDEX:
            stream.write((MAX_JSON_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(size)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=saying(file, MAX_JSON_BYTES)):
        read_headers(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/stdin"])
def test_devices_are_not_opened(device: str) -> None:
    with pytest.raises(CheckpointError), regular_file(Path(device)):
        pass


def test_an_error_of_the_disk_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    file.write_text("{}")

    def fails(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    error = None
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fails)
        try:
            read_json_file(file, "the configuration")
        except CheckpointError as caught:
            error = str(caught)
    assert error is not None
    assert says(error, file, "Input/output error")


def test_the_last_of_repeated_keys_counts_unless_they_must_be_unique() -> None:
    text = b'{"a": {"b": 1, "b": 2}}'
    assert parse_json(text, "x") == {"a": {"b": 2}}
    with pytest.raises(CheckpointError, match=saying("x", "'b'", "twice")):
        parse_json(text, "x", unique=True)


def test_configurations_may_hold_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    """The transformers library writes them: ``time_step_limit`` of published state-space models."""
    file = tmp_path / "config.json"
    file.write_text('{"time_step_limit": [0.0, Infinity], "a": -Infinity}')
    found = read_json_file(file, "the configuration", infinities=True)
    assert found == {"time_step_limit": [0.0, float("inf")], "a": float("-inf")}
    with pytest.raises(CheckpointError, match=saying(file, "Infinity")):
        read_json_file(file, "the index of tensors")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "JSON"),
        (b"\xff", "JSON"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b"Infinity", "Infinity"),
        (b"[" * 10**6, "nested"),
        (b'{"a":' * 10**5, "nested"),
        (b"9" * 10_000, "JSON"),
    ],
)
def test_what_is_not_json_is_one_error(text: bytes, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=saying("file", complaint)) as caught:
        parse_json(text, "file")
    assert "\n" not in str(caught.value)
