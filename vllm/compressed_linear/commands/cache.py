# SPDX-License-Identifier: Apache-2.0
"""Table of the entries of the prepared-weights cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm.compressed_linear.commands.text import NUMBER, compress_names, size
from vllm.compressed_linear.prepare.cache.inventory import FoundEntry

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class _Row:
    """Entries whose layers differ only by index."""

    model: str
    layers: str
    backend: str
    remark: str
    entries: tuple[FoundEntry, ...]


def age(seconds: float) -> str:
    """Format a duration in the largest unit that gives a whole number: 7300 → ``2 h``."""
    for length, unit in _UNITS:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "0 s"


def print_cache(entries: Sequence[FoundEntry], console: Console) -> None:
    """A table for each model with one line for each group of layers, and the sum."""
    rows = _rows(entries)
    for model in dict.fromkeys(row.model for row in rows):
        console.print(Text(model, style="bold"))
        console.print(_table([row for row in rows if row.model == model]))
    total = size(sum(e.nbytes for e in entries))
    console.print(Text(f"{len(entries)} entries, {total}", style="bold"))


def _table(rows: Sequence[_Row]) -> Table:
    now = time.time()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("Layers", overflow="fold")
    table.add_column("Backend", overflow="fold")
    for name in ("Files", "Bytes", "Age", "Last use"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        created = [e.entry.label.created for e in row.entries if e.entry is not None]
        table.add_row(
            Text(row.layers + (f"\n{row.remark}" if row.remark else "")),
            row.backend,
            str(len(row.entries)),
            size(sum(e.nbytes for e in row.entries)),
            age(now - min(created)) if created else "",
            age(now - max(e.used for e in row.entries)),
            style="dim" if row.remark else "",
        )
    return table


def _rows(entries: Sequence[FoundEntry]) -> list[_Row]:
    groups: dict[tuple[str, str, str, str], list[FoundEntry]] = {}
    for found in entries:
        if found.entry is None:
            key = ("no entries", f"{found.path.name}: {found.reason}", "", "")
        else:
            label, fields = found.entry.label, found.entry.key
            key = (
                label.model or "unknown model",
                NUMBER.sub("#", label.layer),
                f"{fields.get('backend')} ({fields.get('variant')})".removesuffix(" ()"),
                "of another version" if found.foreign else "",
            )
        groups.setdefault(key, []).append(found)
    return [
        _Row(model, _layers(pattern, same), backend, remark, tuple(same))
        for (model, pattern, backend, remark), same in sorted(groups.items())
    ]


def _layers(pattern: str, same: Sequence[FoundEntry]) -> str:
    names = [found.entry.label.layer for found in same if found.entry is not None]
    return compress_names(list(dict.fromkeys(names))) if names else pattern
