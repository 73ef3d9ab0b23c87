# SPDX-License-Identifier: Apache-2.0
"""Tiles measured on a GPU. There are none until this has been run on a GPU::

    python -m benchmarks.triton_tiles

which adds to ``PATH``, to be committed. JSON, one entry per line::

    {"format": "triton tiles", "version": 1,
     "entries": [{"capability": 90, "operand": "16-bit", "codes": "1-4", "up_to": 16,
                  "tiles": {"block_m": …, "block_n": …, "block_k": …, "warps": …, "stages": …},
                  "gpu": its name, "triton": the version that compiled it}]}

Entries of another version of Triton do not count: it may take more shared memory for the same.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm.compressed_linear.backends.triton.spec import COLUMN_MULTIPLE

PATH = Path(__file__).with_name("measured.json")
FORMAT, VERSION = "triton tiles", 1
EVERY_M = 1 << 62
"""``up_to`` of the class that has no largest M."""


@dataclass(frozen=True)
class Tiles:
    """A program's part: ``block_m`` tokens × ``block_n`` output channels, in steps of ``block_k``
    input channels, by ``warps`` warps, with ``stages`` steps loaded ahead."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        powers = (self.block_m, self.block_n, self.block_k, self.warps)
        if any(type(size) is not int or size < 1 or size & (size - 1) for size in powers):
            raise ValueError(f"tiles {powers}, expected powers of two")
        if min(powers[:3]) < 16 or COLUMN_MULTIPLE % self.block_n or not 1 <= self.stages <= 16:
            raise ValueError(
                f"{self}: expected blocks of at least 16, of at most {COLUMN_MULTIPLE} output "
                "channels, and 1 to 16 stages"
            )


@dataclass(frozen=True)
class TileClass:
    """Calls with the same tiles: on GPUs of a compute ``capability``, multiplying an ``operand``
    ("16-bit", "parts" or "32-bit"), with codes of "1-4" or "5-8" bits, ``up_to`` so many tokens."""

    capability: int
    operand: str
    codes: str
    up_to: int


@functools.cache
def table() -> dict[TileClass, Tiles]:
    """Class → tiles, read once for each process; empty where nothing was measured."""
    return {
        _class_of(entry): Tiles(**entry["tiles"])
        for entry in read(PATH)
        if entry["triton"] == triton_version()
    }


def _class_of(entry: Mapping[str, Any]) -> TileClass:
    return TileClass(**{f.name: entry[f.name] for f in fields(TileClass)})


def triton_version() -> str:
    """That of the Triton installed here, empty if there is none."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of the file; none without a file. Raises ``ValueError`` if it is another kind of
    file or damaged."""
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text())
        if (data["format"], data["version"]) != (FORMAT, VERSION):
            raise ValueError(f"version {data['version']} of {data['format']!r}")
        for entry in data["entries"]:
            Tiles(**entry["tiles"])
            wrong = [f.name for f in fields(TileClass) if type(entry[f.name]).__name__ != f.type]
            if wrong or not isinstance(entry["triton"], str):
                raise ValueError(f"{wrong} of entry {entry}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no measured tiles (version {VERSION} of {FORMAT!r}): "
            f"{type(error).__name__}: {error}"
        ) from None
    return list(data["entries"])


def add(path: Path, found: Mapping[TileClass, Tiles], gpu: str) -> None:
    """Write ``found`` into the file in the place of what it has for the same classes."""
    new = [
        {**asdict(key), "tiles": asdict(tiles), "gpu": gpu, "triton": triton_version()}
        for key, tiles in found.items()
    ]
    kept = [entry for entry in read(path) if _class_of(entry) not in found]
    entries = sorted(
        kept + new, key=lambda e: (e["capability"], e["operand"], e["codes"], e["up_to"])
    )
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    head = f'"format": {json.dumps(FORMAT)}, "version": {VERSION}'
    path.write_text(f'{{{head}, "entries": [\n{lines}\n]}}\n')
