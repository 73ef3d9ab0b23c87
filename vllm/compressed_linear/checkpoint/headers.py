# SPDX-License-Identifier: Apache-2.0
"""Safetensors headers of a checkpoint: names, dtypes and shapes, without reading weights.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data
(safetensors documentation).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from vllm.compressed_linear.checkpoint.shard import CheckpointError

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

_BYTES = {code: getattr(torch, name).itemsize for code, name in _DTYPES.items()}

INDEX = "model.safetensors.index.json"
"""Tensor name → file, for checkpoints of several files."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file: dtype (torch's name), shape, bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


class Headers(Mapping[str, TensorHeader]):
    """Tensor name → header, over all files of a checkpoint."""

    def __init__(self, tensors: Mapping[str, TensorHeader]) -> None:
        self._tensors = dict(tensors)
        self._modules: dict[str, set[str]] = {}
        for name in self._tensors:
            module, _, last = name.rpartition(".")
            self._modules.setdefault(module, set()).add(last)

    def __getitem__(self, name: str) -> TensorHeader:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def modules(self) -> Mapping[str, set[str]]:
        """Module name → last parts of its tensors' names."""
        return self._modules

    def renamed(self, names: Mapping[str, str]) -> Headers:
        """The same tensors under other names; names that are not in the mapping stay."""
        return Headers({names.get(k, k): v for k, v in self._tensors.items()})


def read_headers(directory: str | Path) -> Headers | None:
    """Headers of a local directory's safetensors files; None if it has none.

    If there is an index, only the files it names are read, as in vLLM. Raises ``CheckpointError``
    with the file, and the tensor if possible, when a file is missing, truncated or damaged.
    """
    path = Path(directory)
    if not path.is_dir():
        return None
    tensors: dict[str, TensorHeader] = {}
    files = _files(path)
    for file in files:
        tensors.update(_read_file(file))
    return Headers(tensors) if files else None


def headers_of(entries: Mapping[str, Mapping[str, Any]], origin: str) -> Headers:
    """Parse header entries of safetensors files; ``origin`` is for messages."""
    return Headers({name: _read_entry(origin, name, entry) for name, entry in entries.items()})


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        return sorted(directory.glob("*.safetensors"))
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{index}: not an index of tensors: {error!r}") from None
    first_tensor = {file: name for name, file in reversed(weight_map.items())}
    for file, name in first_tensor.items():
        if not (directory / file).is_file():
            raise CheckpointError(
                f"{directory / file} is missing; {INDEX} says that it holds {name}"
            )
    return sorted(directory / file for file in first_tensor)


def _read_file(file: Path) -> dict[str, TensorHeader]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file}: {size} bytes, expected at least 8 (is it truncated?)")
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8:
            raise CheckpointError(
                f"{file}: header of {length} bytes in a file of {size} bytes (truncated, or not a "
                "safetensors file)"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file}: header is invalid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is a {type(header).__name__}, expected a map")
    header.pop("__metadata__", None)
    tensors = {name: _read_entry(file, name, entry) for name, entry in header.items()}
    ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items()}
    cut = [name for name, end in ends.items() if end > size]
    if cut:
        raise CheckpointError(
            f"{file}: {size} bytes, but its tensors need {max(ends.values())}; the file is "
            f"truncated (first tensor cut off: {min(cut, key=ends.__getitem__)})"
        )
    return tensors


def _read_entry(file: Path | str, name: str, entry: Any) -> TensorHeader:
    try:
        first, last = (int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(length) for length in entry["shape"])
        code = str(entry["dtype"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{file}: tensor {name} is described as {entry!r}, expected dtype, shape and two "
            "data_offsets"
        ) from None
    dtype = _DTYPES.get(code, code.lower())
    needed = prod(shape) * _BYTES[code] if code in _BYTES else last - first
    if last - first != needed:
        raise CheckpointError(
            f"{file}: tensor {name} has {last - first} bytes, expected {needed} for {dtype} "
            f"{list(shape)}"
        )
    return TensorHeader(dtype, shape, last - first, str(file))


def shard_names(prefix: str, packed_modules: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the modules that the layer ``prefix`` fuses, in order; itself if it fuses none.

    ``packed_modules``: a model's ``packed_modules_mapping``, last name part of a fused layer →
    those of its members.
    """
    parent, dot, last = prefix.rpartition(".")
    return [f"{parent}{dot}{member}" for member in packed_modules.get(last, (last,))]


def last_word(module: str) -> str:
    """Last non-numeric component of a dotted module name."""
    return next((part for part in reversed(module.split(".")) if not part.isdigit()), "")
