# SPDX-License-Identifier: Apache-2.0
"""Read files that a stranger may have written: regular files only, bounded in size, strict JSON.

No function here raises anything but ``CheckpointError``, waits for a pipe or a device, or allocates
more than ``MAX_JSON_BYTES`` because a file claims to need it.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vllm.compressed_linear.checkpoint.shard import CheckpointError

MAX_JSON_BYTES = 100_000_000
"""Limit of a header, an index or a configuration. The safetensors library has it for headers; the
largest headers published so far, of some 10⁵ tensors, take 20 MB."""


@contextmanager
def regular_file(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file: its stream and its size in bytes.

    A symbolic link is followed within its directory, to a blob of Hugging Face's cache, or to a
    file with the same suffix, and nowhere else. Raises ``CheckpointError`` for any other file, and
    for every ``OSError`` while it is open.
    """
    _check_link(path)
    try:
        # Opening a device may already do something to it.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is {_kind(mode)}, expected a regular file")
        stream = path.open("rb")
    except OSError as error:
        raise _unreadable(path, error) from None
    with stream:
        try:
            # By the open file, which may be another by now.
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path} is {_kind(found.st_mode)}, expected a regular file")
            yield stream, found.st_size
        except OSError as error:
            raise _unreadable(path, error) from None


def read_json_file(path: Path, what: str, *, infinities: bool = False) -> Any:
    """The JSON value in a file. ``what``: what it should be, for messages. ``infinities``: as in
    ``parse_json``."""
    with regular_file(path) as (stream, size):
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: {size} bytes, expected {what} of at most {MAX_JSON_BYTES}"
            )
        data = stream.read(size)
    return parse_json(data, f"{path}: {what}", infinities=infinities)


def parse_json(data: bytes, origin: str, *, unique: bool = False, infinities: bool = False) -> Any:
    """Parse UTF-8 JSON. ``origin`` begins messages; ``unique``: refuse a repeated key, of which
    every reader would take another; ``infinities``: take ``Infinity``, ``-Infinity`` and ``NaN``,
    which JSON does not have and the transformers library writes into configurations."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(found)
        if unique and len(entries) < len(found):
            twice = Counter(key for key, _ in found).most_common(1)[0][0]
            raise CheckpointError(f"{origin} has the key {shortened(twice)} twice")
        return entries

    def constant(name: str) -> float:
        if infinities:
            return float(name)
        raise ValueError(f"{name} is not a value of JSON")

    try:
        return json.loads(data.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{origin} is nested too deeply for JSON") from None
    except ValueError as error:
        raise CheckpointError(f"{origin} is invalid JSON: {error}") from None


def shortened(value: Any) -> str:
    """A value of a file in a message: printable, and not too long."""
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _check_link(path: Path) -> None:
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    inside = target.is_relative_to(os.path.realpath(path.parent))
    if target != path and not blob and not inside and target.suffix != path.suffix:
        raise CheckpointError(
            f"{path} is a link to {target}, expected one to a file of the checkpoint, to a blob of "
            f"Hugging Face's cache, or to another {path.suffix} file"
        )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror}")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a block device",
        stat.S_IFCHR: "a character device",
    }
    return kinds.get(stat.S_IFMT(mode), "a special file")
