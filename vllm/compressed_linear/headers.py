# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's safetensors headers say: names, dtypes and shapes, no weights read.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data
(safetensors documentation).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm.compressed_linear.weights import CheckpointError

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
    """Headers of every ``*.safetensors`` file of a local directory; None where there is none.

    Raises ``CheckpointError`` naming the file when one is truncated or damaged.
    """
    path = Path(directory)
    if not path.is_dir():
        return None
    files = sorted(path.glob("*.safetensors"))
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        tensors.update(_read_file(file))
    return Headers(tensors) if files else None


def _read_file(file: Path) -> dict[str, TensorHeader]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{file}: {size} bytes, expected at least 8 (is it truncated?)")
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8:
            raise CheckpointError(
                f"{file}: header of {length} bytes in a file of {size} bytes (truncated or no "
                "safetensors file)"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file}: header is no JSON: {error}") from None
    header.pop("__metadata__", None)
    tensors = {}
    end = 0
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        end = max(end, last)
        tensors[name] = TensorHeader(
            _DTYPES.get(entry["dtype"], entry["dtype"].lower()),
            tuple(entry["shape"]),
            last - first,
            str(file),
        )
    if 8 + length + end > size:
        cut = [n for n, e in header.items() if 8 + length + e["data_offsets"][1] > size]
        raise CheckpointError(
            f"{file}: {size} bytes, but its tensors need {8 + length + end}; the file is truncated "
            f"(first tensor cut off: {min(cut, key=lambda n: header[n]['data_offsets'][1])})"
        )
    return tensors
