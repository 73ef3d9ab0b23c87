# SPDX-License-Identifier: Apache-2.0
"""List, verify and prune a directory of prepared weights."""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.compressed_linear.prepare.cache.entry import Entry, EntryError, read_entry, verify_entry
from vllm.compressed_linear.prepare.cache.store import SUFFIX, UNFINISHED, installation

_SIZES = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_AGES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class FoundEntry:
    """One file of a cache. ``used``: Unix time of the last write or read. ``entry``: its header, or
    None, with the ``reason``."""

    path: Path
    nbytes: int
    used: float
    entry: Entry | None
    reason: str = ""

    @property
    def foreign(self) -> bool:
        """Whether this installation cannot use it: written by another version, or corrupt."""
        return self.entry is None or self.entry.key.get("installation") != installation()

    def to_json(self) -> dict[str, Any]:
        """Serialize everything except the tensors."""
        common: dict[str, Any] = {
            "file": str(self.path),
            "bytes": self.nbytes,
            "used": self.used,
            "foreign": self.foreign,
        }
        if self.entry is None:
            return common | {"reason": self.reason}
        label, key = self.entry.label, self.entry.key
        return common | {
            "model": label.model,
            "layer": label.layer,
            "descriptor": label.descriptor,
            "created": label.created,
            **{name: key.get(name) for name in ("backend", "layout", "variant", "installation")},
        }


@dataclass(frozen=True)
class PruneRules:
    """Entries that ``prune`` removes; any rule suffices. ``older_than``: seconds since the last
    use. ``max_bytes``: limit for the rest; the least recently used entries go first."""

    older_than: float | None = None
    max_bytes: int | None = None
    foreign: bool = False
    everything: bool = False


def read_cache(directory: Path) -> list[FoundEntry]:
    """All entries of a cache, least recently used first. Ignores other files.

    Raises ``ValueError`` if the directory does not exist.
    """
    if not directory.is_dir():
        raise ValueError(f"directory {directory} does not exist")
    found = []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        with suppress(FileNotFoundError):  # pruned by another process
            found.append(_read(path))
    return sorted(found, key=lambda entry: entry.used)


def _read(path: Path) -> FoundEntry:
    stat = path.stat()
    entry, reason = None, ""
    try:
        with path.open("rb") as stream:
            entry = read_entry(stream)
    except FileNotFoundError:
        raise
    except (EntryError, OSError) as error:
        reason = str(error)
    return FoundEntry(path, stat.st_size, stat.st_mtime, entry, reason)


def fault(found: FoundEntry) -> str:
    """Verify all of an entry: why it cannot be used, or empty."""
    if found.entry is None:
        return found.reason
    try:
        with found.path.open("rb") as stream:
            verify_entry(stream, found.entry)
    except (EntryError, OSError) as error:
        return str(error)
    return ""


def prune(directory: Path, rules: PruneRules) -> list[tuple[Path, int]]:
    """Remove entries by ``rules``, and unfinished files of killed writers; returns each file and
    its bytes.

    Keeps files that are being written. Servers that have mapped an entry keep it in memory.
    Raises ``ValueError`` if the directory does not exist.
    """
    entries = read_cache(directory)
    going = [entry for entry in entries if _is_named(entry, rules)]
    if rules.max_bytes is not None:
        staying = [entry for entry in entries if entry not in going]
        total = sum(entry.nbytes for entry in staying)
        for entry in staying:
            if total <= rules.max_bytes:
                break
            total -= entry.nbytes
            going.append(entry)
    removed = list(_leftovers(directory))
    for entry in going:
        entry.path.unlink(missing_ok=True)
        removed.append((entry.path, entry.nbytes))
    return removed


def _is_named(entry: FoundEntry, rules: PruneRules) -> bool:
    old = rules.older_than is not None and time.time() - entry.used > rules.older_than
    return rules.everything or old or (rules.foreign and entry.foreign)


def _leftovers(directory: Path) -> Iterator[tuple[Path, int]]:
    """Remove unfinished files without a writer."""
    for path in sorted(directory.glob(f".*{UNFINISHED}")):
        with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            nbytes = path.stat().st_size
            path.unlink()
            yield path, nbytes


def parse_bytes(text: str) -> int:
    """Parse ``1500``, ``20G``, ``1.5GiB``: bytes, in powers of 1024. Raises ``ValueError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size (examples: 1500, 20G, 1.5GiB)")
    return int(float(match[1]) * _SIZES[match[2]])


def parse_age(text: str) -> float:
    """Parse ``90s``, ``12h``, ``30d``: seconds. Raises ``ValueError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a duration (examples: 90s, 30m, 12h, 30d, 4w)")
    return float(match[1]) * _AGES[match[2]]
