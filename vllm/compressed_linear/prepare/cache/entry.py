# SPDX-License-Identifier: Apache-2.0
"""One entry of the prepared-weights cache: named tensors in a memory-mappable file.

    0        8 bytes   ``MAGIC``
    8        8 bytes   length H of the header, little-endian
    16       H bytes   JSON: key, label, size of the file; name, dtype, shape, offset of each tensor
    ...      tensors, each at a multiple of ``ALIGNMENT``, with zeros between
    size−32  32 bytes  digest (``digest.py``) of everything before

This is not a safetensors file because that format allows no padding between tensors, and kernels
need aligned vectors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, BinaryIO

import torch

from vllm.compressed_linear.prepare.cache.digest import DIGEST_BYTES, PieceDigest, digest_file
from vllm.compressed_linear.spec.elements import dtype_name, torch_dtype

MAGIC = b"VCLPREP1"
ALIGNMENT = 64
"""Bytes; a cache line, and a vector of AVX-512."""
_PREFIX = struct.Struct("<8sQ")


class EntryError(ValueError):
    """Not a cache entry, or a corrupt one. The message says what was found, without the name."""


@dataclass(frozen=True)
class Label:
    """Description of an entry for listings; not a part of its key. ``created``: Unix time."""

    model: str
    layer: str
    descriptor: str
    created: float


@dataclass(frozen=True)
class Slot:
    """Position of a tensor: ``offset`` in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * torch_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Entry:
    """The header of an entry. ``size``: of the whole file in bytes."""

    key: dict[str, Any]
    label: Label
    size: int
    slots: tuple[Slot, ...]


def write_entry(
    stream: BinaryIO, key: Mapping[str, Any], label: Label, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write an entry to an empty file. Raises ``ValueError`` for a tensor that is not contiguous,
    not on the CPU, or of an unsupported dtype."""
    offset = 0
    slots = []
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(
                f"prepared tensor {name} is on {tensor.device} with strides {tensor.stride()} for "
                f"shape {tuple(tensor.shape)}, expected a contiguous one on the CPU"
            )
        slot = Slot(name, dtype_name(tensor.dtype), tuple(tensor.shape), offset)
        offset = _aligned(offset + slot.nbytes)
        slots.append(slot)
    header = _header(key, label, slots, offset)
    digest = PieceDigest()

    def put(data: bytes | memoryview) -> None:
        digest.update(data)
        stream.write(data)

    put(_PREFIX.pack(MAGIC, len(header)))
    put(header)
    for slot, tensor in zip(slots, tensors.values(), strict=True):
        put(tensor_bytes(tensor))
        put(bytes(_aligned(slot.nbytes) - slot.nbytes))
    stream.write(digest.digest())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_entry(stream: BinaryIO) -> Entry:
    """The header of an open file. Raises ``EntryError`` if it is incomplete or corrupt."""
    found = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    prefix = stream.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or prefix[: len(MAGIC)] != MAGIC:
        raise EntryError(f"begins with {prefix[: len(MAGIC)]!r}, expected {MAGIC!r}")
    (_, length) = _PREFIX.unpack(prefix)
    if length > found - _PREFIX.size - DIGEST_BYTES:
        raise EntryError(f"has a header of {length} bytes in {found} bytes (truncated?)")
    try:
        data = json.loads(stream.read(length))
        entry = Entry(
            dict(data["key"]),
            _read_label(data["label"]),
            int(data["size"]),
            tuple(Slot(**(slot | {"shape": tuple(slot["shape"])})) for slot in data["slots"]),
        )
        fits = all(
            slot.offset % ALIGNMENT == 0
            and _PREFIX.size + length <= slot.offset <= entry.size - DIGEST_BYTES - slot.nbytes
            for slot in entry.slots
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EntryError(f"has a header that cannot be read ({error!r})") from None
    if entry.size != found:
        raise EntryError(f"has {found} bytes, expected {entry.size} (truncated?)")
    if not fits:
        raise EntryError("has a header that names bytes beyond its tensors")
    return entry


def verify_entry(stream: BinaryIO, entry: Entry) -> None:
    """Read and verify an open entry. Raises ``EntryError`` if its digest differs, ``OSError`` if
    it cannot be read."""
    content = entry.size - DIGEST_BYTES
    try:
        digest = digest_file(stream.fileno(), content)
    except EOFError as error:
        raise EntryError(str(error)) from None
    stored = os.pread(stream.fileno(), DIGEST_BYTES, content)
    if digest != stored:
        raise EntryError(f"is damaged: its digest is {digest.hex()}, expected {stored.hex()}")


def map_entry(stream: BinaryIO, entry: Entry) -> dict[str, torch.Tensor]:
    """The tensors of an open entry, mapped.

    Pages are shared by all processes that map the file. The mapping is copy-on-write: a process
    that writes to a tensor, as vLLM's weight reload does, gets private pages and never changes the
    file. The mapping lasts as long as the tensors, even if the file is removed.
    """
    # By the file descriptor, so that the verified file is mapped.
    path = f"/proc/self/fd/{stream.fileno()}"
    mapped = torch.from_file(path, shared=False, size=entry.size, dtype=torch.uint8)
    return {slot.name: _tensor_at(mapped.numpy().data, slot) for slot in entry.slots}


def _tensor_at(mapped: memoryview, slot: Slot) -> torch.Tensor:
    """A tensor with its own storage in the mapping, which it keeps alive.

    Views of one storage with several dtypes can be neither pickled nor saved.
    """
    dtype, count = torch_dtype(slot.dtype), prod(slot.shape)
    if not count:
        return torch.empty(slot.shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=slot.offset).view(slot.shape)


def _read_label(data: Mapping[str, Any]) -> Label:
    model, layer, descriptor = (str(data[name]) for name in ("model", "layer", "descriptor"))
    return Label(model, layer, descriptor, float(data["created"]))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _header(key: Mapping[str, Any], label: Label, slots: list[Slot], nbytes: int) -> bytes:
    """The header, padded with blanks so that tensors begin at a multiple of ``ALIGNMENT``.

    ``slots`` count from the first tensor, ``nbytes`` is the length of all of them. The offsets in
    the header depend on its length, so space is added until it fits.
    """
    length = _aligned(_PREFIX.size) - _PREFIX.size
    while True:
        begin = _PREFIX.size + length
        moved = [{**asdict(slot), "offset": slot.offset + begin} for slot in slots]
        text = json.dumps(
            {
                "key": key,
                "label": asdict(label),
                "size": begin + nbytes + DIGEST_BYTES,
                "slots": moved,
            }
        ).encode()
        if len(text) <= length:
            return text.ljust(length)
        length = _aligned(_PREFIX.size + len(text)) - _PREFIX.size
