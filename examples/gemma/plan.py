# SPDX-License-Identifier: Apache-2.0
"""Shows on which processor each kind of layer runs, on which backend, and why on that one, from the
plan that a server wrote as it loaded."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

CHOSEN_BY = {
    "cost model": "the fastest by estimate for this processor",
    "tuned": "the fastest by measurement on this processor",
    "asked for": "the one that was asked for",
}
"""Words for `chosen_by` of the plan."""


@dataclass
class Row:
    """Like layers on one backend: how many, bytes before and after preparation, its seconds."""

    layers: int = 0
    checkpoint: int = 0
    prepared: int = 0
    seconds: float = 0.0

    def add(self, layer: dict[str, Any]) -> None:
        """Counts one layer of the plan; what the plan does not say counts as nothing."""
        self.layers += 1
        self.checkpoint += layer.get("bytes_checkpoint") or 0
        self.prepared += layer.get("bytes_prepared") or 0
        self.seconds += layer.get("prepare_seconds") or 0.0


@dataclass(frozen=True)
class Written:
    """A plan: the layers that hold weights, and the machine they were prepared for."""

    layers: list[dict[str, Any]]
    machine: dict[str, Any]


def read(path: Path) -> Written:
    """The plan in `path`; ValueError if it has no layer that holds weights."""
    found = json.loads(path.read_text())
    layers = [layer for layer in found.get("layers", []) if layer.get("kind") != "Attention"]
    if not layers:
        raise ValueError(f"{path} names no layer: the model does not run on compressed_linear")
    return Written(layers, found.get("machine", {}))


def show(plan: Written, console: Console) -> None:
    """Prints the processor, a table with one line for each kind of layer and backend and their
    sum, and the reasons of the choice."""
    if machine := plan.machine:
        threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
        console.print(
            f"Processor: {machine['processor']} ({machine['platform']}, {threads})",
            highlight=False,
        )
    _show_layers(plan.layers, console)
    console.print("Why:", style="bold")
    for line in reasons(plan.layers):
        console.print(Padding(line, (0, 0, 0, 2)), highlight=False)


def reasons(layers: list[dict[str, Any]]) -> list[str]:
    """Why each backend was chosen, and the first reason why each other one was not: one line for
    layers of which the same is to be said. The plan has all reasons."""
    kinds: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for layer in layers:
        for line in _reasons_of(layer):
            kinds[line][layer["name"].rpartition(".")[2]] = None
    return [f"{', '.join(names)}: {line}" for line, names in kinds.items()]


def _reasons_of(layer: dict[str, Any]) -> list[str]:
    """The reasons of one layer's choice, the chosen backend's first."""
    rejected = layer.get("rejected") or []
    slower = [other["backend"] for other in rejected if not other["reasons"]]
    chosen_by = CHOSEN_BY.get(layer.get("chosen_by") or "", "")
    if not chosen_by:
        return [f"{_runs(layer)}: {layer['note']}"] if layer.get("note") else []
    if slower:
        chosen_by += f" (others that can: {', '.join(slower)})"
    lines = [f"{_runs(layer)} is {chosen_by}"]
    for other in rejected:
        if other["reasons"]:
            first, *more = other["reasons"]
            lines.append(f"{other['backend']} cannot run it: {first}{' ...' if more else ''}")
    return lines


def _show_layers(layers: list[dict[str, Any]], console: Console) -> None:
    rows: defaultdict[tuple[str, str], Row] = defaultdict(Row)
    total = Row()
    for layer in layers:
        rows[layer["name"].rpartition(".")[2], _runs(layer)].add(layer)
        total.add(layer)
    table = Table(title="What runs the linear layers", show_footer=True, box=SIMPLE_HEAD)
    heads = ("kind", "backend", "layers", "checkpoint", "prepared", "in")
    feet = ("all", "", *_cells(total))
    for index, (head, foot) in enumerate(zip(heads, feet, strict=True)):
        table.add_column(head, foot, justify="left" if index < 2 else "right")
    for (kind, backend), row in rows.items():
        table.add_row(kind, backend, *_cells(row))
    console.print(table)


def _runs(layer: dict[str, Any]) -> str:
    backend, variant = layer.get("backend") or "unknown", layer.get("variant")
    return f"{backend} ({variant})" if variant else backend


def _cells(row: Row) -> tuple[str, ...]:
    sizes = (f"{size / 1e6:.2f} MB" for size in (row.checkpoint, row.prepared))
    return (str(row.layers), *sizes, f"{row.seconds * 1e3:.1f} ms")
