# SPDX-License-Identifier: Apache-2.0
"""Shows which backend runs each kind of layer, from the plan a server wrote as it loaded."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


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


def read(path: Path) -> list[dict[str, Any]]:
    """The plan's layers in `path` that hold weights; ValueError if there are none."""
    layers: list[dict[str, Any]] = json.loads(path.read_text()).get("layers", [])
    with_weights = [layer for layer in layers if layer.get("kind") != "Attention"]
    if not with_weights:
        raise ValueError(f"{path} names no layer: the model does not run on compressed_linear")
    return with_weights


def show(layers: list[dict[str, Any]], console: Console) -> None:
    """Prints a table with one line for each kind of layer and backend, and their sum."""
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
