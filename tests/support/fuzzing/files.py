# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint in memory: what mutators change, and how it is written to a directory."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
FILE = "model.safetensors"


@dataclass(frozen=True)
class Tensor:
    """One tensor as its file has it: dtype of the header, shape, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class Mutant:
    """A changed copy of a checkpoint.

    ``tensors``: of the main file, by name. ``more``: further files with their tensors. ``index``:
    tensor → file, None for a checkpoint without one. ``edits``: changes of what was written.
    ``about``: texts of which an error must name one. ``harmless``: it may also be read as if it was
    not changed. ``must_read``: an error
    would be a false alarm, if nothing else is changed. ``done``: what was changed, in words.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    more: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    index: Any = None
    edits: list[Callable[[Path], None]] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    harmless: bool = False
    must_read: bool = False
    done: list[str] = field(default_factory=list)

    def write(self, directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps(self.config))
        write_file(directory / FILE, self.tensors)
        for name, tensors in self.more.items():
            write_file(directory / name, tensors)
        if self.index is not None:
            (directory / INDEX).write_text(json.dumps(self.index))
        for edit in self.edits:
            edit(directory)

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization_config, to be changed; an empty map if an earlier change replaced it."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, dict) else {}

    @property
    def all_tensors(self) -> dict[str, Tensor]:
        """Every tensor under its name; the main file has precedence."""
        found: dict[str, Tensor] = {}
        for tensors in self.more.values():
            found |= tensors
        return found | self.tensors


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, written by this function and not by a library, which would refuse most
    mutants."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    body = b"".join(tensor.data for tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def read_file(path: Path) -> dict[str, Tensor]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: Tensor(e["dtype"], tuple(e["shape"]), body[slice(*e["data_offsets"])])
        for name, e in header.items()
    }


@cache
def _loaded(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= read_file(file)
    return json.loads((directory / "config.json").read_text()), tensors


def unmutated(directory: Path) -> Mutant:
    """A fresh copy of the checkpoint in ``directory``."""
    config, tensors = _loaded(directory)
    return Mutant(directory.name, copy.deepcopy(config), dict(tensors))
