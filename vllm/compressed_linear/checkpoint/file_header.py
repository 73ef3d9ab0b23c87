# SPDX-License-Identifier: Apache-2.0
"""The header of one safetensors file, checked as strictly as the safetensors library checks it.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data without gaps
(safetensors documentation). A header that claims sizes beyond its file allocates nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from vllm.compressed_linear.checkpoint.bounded_read import (
    MAX_JSON_BYTES,
    parse_json,
    regular_file,
    shortened,
)
from vllm.compressed_linear.checkpoint.shard import CheckpointError

_DTYPES = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F6_E2M3": ("f6_e2m3", 6),
    "F6_E3M2": ("f6_e3m2", 6),
    "F4": ("f4", 4),
    "C64": ("complex64", 64),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
}
"""dtype in a header → torch's name (or the same in lower case), and bits of an element."""

_MAX_DIMENSIONS = 64
"""As in numpy; torch's own limit is lower."""
_MAX_NUMBER = 2**63 - 1
_LISTS = (list, tuple)
_PREFIX = struct.Struct("<Q")


class TensorHeader(NamedTuple):
    """One tensor of a file: dtype (torch's name), shape, bytes in the file. A tuple, since a
    mixture has hundreds of thousands."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str


def read_file_header(file: Path) -> dict[str, TensorHeader]:
    """Tensor name → header. Raises ``CheckpointError`` naming the file, and the tensor if one is
    at fault."""
    with regular_file(file) as (stream, size):
        prefix = stream.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            raise CheckpointError(f"{file}: {size} bytes, expected at least 8 (is it truncated?)")
        (length,) = _PREFIX.unpack(prefix)
        if length > size - _PREFIX.size:
            raise CheckpointError(
                f"{file}: header of {length} bytes in a file of {size} bytes (truncated, or not a "
                "safetensors file)"
            )
        if length > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{file}: header of {length} bytes, expected at most {MAX_JSON_BYTES}"
            )
        data = stream.read(length)
    header = parse_json(data, f"{file}: header", unique=True)
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is a {type(header).__name__}, expected a map")
    _check_metadata(file, header.pop("__metadata__", None))
    origin = str(file)
    tensors = {name: read_entry(origin, name, entry) for name, entry in header.items()}
    _check_positions(file, header, _PREFIX.size + length, size)
    return tensors


def read_entry(origin: str, name: str, entry: Any) -> TensorHeader:
    """Parse the entry of one tensor; ``origin`` is its file, or what messages call it."""
    if not name.isprintable():
        raise CheckpointError(
            f"{origin}: a tensor is called {shortened(name)}, expected printable text"
        )
    numbers: list[Any] = []
    code = None
    if isinstance(entry, dict):
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        code = entry.get("dtype")
        # JSON has lists; the hub's library gives the offsets as a tuple.
        if isinstance(shape, _LISTS) and isinstance(offsets, _LISTS) and len(offsets) == 2:
            # The product of a million large numbers would take hours.
            if len(shape) > _MAX_DIMENSIONS:
                raise CheckpointError(
                    f"{origin}: tensor {name} has {len(shape)} dimensions, expected at most "
                    f"{_MAX_DIMENSIONS}"
                )
            numbers = [*offsets, *shape]
    if (
        not numbers
        or not isinstance(code, str)
        or {*map(type, numbers)} != {int}
        or min(numbers) < 0
        or max(numbers) > _MAX_NUMBER
    ):
        raise CheckpointError(
            f"{origin}: tensor {name} is described as {shortened(entry)}, expected dtype, shape "
            "and two data_offsets (whole numbers, not negative)"
        )
    if code not in _DTYPES:
        raise CheckpointError(
            f"{origin}: tensor {name} has dtype {code[:40]!r}, expected one of {', '.join(_DTYPES)}"
        )
    first, last, *lengths = numbers
    dtype, width = _DTYPES[code]
    needed = -(-prod(lengths) * width // 8)
    if last - first != needed:
        raise CheckpointError(
            f"{origin}: tensor {name} has {last - first} bytes, expected {needed} for {dtype} "
            f"{lengths}"
        )
    return TensorHeader(dtype, tuple(lengths), needed, origin)


def _check_metadata(file: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{file}: __metadata__ is {shortened(metadata)}, expected a map from text to text"
        )


def _check_positions(file: Path, header: Mapping[str, Any], begin: int, size: int) -> None:
    """Raise unless the tensors fill the file from ``begin`` to ``size`` without gap or overlap."""
    end = 0
    before = "the header"
    ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
    for name in ordered:
        first, last = header[name]["data_offsets"]
        if begin + last > size:
            needed = begin + max(entry["data_offsets"][1] for entry in header.values())
            raise CheckpointError(
                f"{file}: {size} bytes, but its tensors need {needed}; the file is truncated "
                f"(first tensor cut off: {name})"
            )
        if first != end:
            fault = "overlaps" if first < end else "leaves a gap after"
            raise CheckpointError(
                f"{file}: tensor {name} begins at offset {first} and {fault} {before}, expected "
                f"offset {end}"
            )
        end, before = last, name
    if begin + end != size:
        raise CheckpointError(
            f"{file}: {size - begin - end} bytes after {before}, expected the end of the file"
        )
