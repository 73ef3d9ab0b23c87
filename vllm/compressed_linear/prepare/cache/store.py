# SPDX-License-Identifier: Apache-2.0
"""The prepared-weights cache: a directory of files with the results of preparation.

The key of an entry is everything that preparation depends on: the bytes of this rank's checkpoint
tensors, their scheme and this rank's part of the weight, the descriptor with its facts, the backend
with its layout and code path, and the version of this package. The bytes themselves and not the
files, because names, times and inodes of files do not include what a model's own loader changed,
and a wrong reuse would be silent.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.checkpoint.parts import Part
from vllm.compressed_linear.checkpoint.shard import LoadedShard
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.cache.digest import digest_memory
from vllm.compressed_linear.prepare.cache.entry import (
    EntryError,
    Label,
    map_entry,
    read_entry,
    tensor_bytes,
    verify_entry,
    write_entry,
)
from vllm.compressed_linear.prepare.cache.ownership import DIRECTORY_MODE, FILE_MODE, fault_of
from vllm.compressed_linear.spec.elements import dtype_name

SUFFIX = ".prepared"
UNFINISHED = ".unfinished"
"""Suffix of a file that is being written; its writer holds a lock on it (``flock``)."""

# A child of vLLM's logger, so that its handlers get the lines; this module does not import vLLM.
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheKey:
    """``fields`` as plain JSON values, and the name of the file that would hold the entry."""

    fields: dict[str, Any]
    name: str


def cache_key(method: QuantLinearMethod, part: Part, platform: Platform) -> CacheKey | None:
    """The key of a part prepared by ``method`` for ``platform``.

    None if the part cannot be cached: the backend names no layout, or the weights are not in CPU
    memory. Reads all of the part's tensors.
    """
    layout = method.layout_version(part.descriptor, platform)
    if layout is None or part.weights.device.type != "cpu":
        return None
    fields = {
        "installation": installation(),
        "backend": method.name,
        "layout": layout,
        "variant": method.prepared_variant(part.descriptor, platform),
        "descriptor": part.descriptor.to_json(),
        "shards": [_shard_fields(shard) for shard in part.weights.shards],
    }
    text = json.dumps(fields, sort_keys=True)
    return CacheKey(json.loads(text), blake3(text.encode()).hexdigest() + SUFFIX)


def _shard_fields(shard: LoadedShard) -> dict[str, Any]:
    """Fields of the key for one shard: everything except its name."""
    source = shard.source
    where = {k: v for k, v in vars(source).items() if k not in ("name", "scheme")}
    return where | {
        # The repr has every field, also fields that are added later.
        "scheme": repr(source.scheme),
        "packings": {name: repr(packing) for name, packing in shard.packings.items()},
        # What the values of whole tensors mean is not in this rank's part of them.
        "counts": {name: sorted(counts.items()) for name, counts in shard.counts.items()},
        "tensors": {
            name: {
                "dtype": dtype_name(tensor.dtype),
                "shape": list(tensor.shape),
                "digest": _tensor_digest(tensor),
            }
            for name, tensor in shard.tensors.items()
        },
    }


def _tensor_digest(tensor: torch.Tensor) -> str:
    return digest_memory(tensor_bytes(tensor.contiguous())).hex()


@cache
def installation() -> str:
    """Version of this package and digest of its code: changes with any of its files."""
    release = version("vllm-compressed-linear")
    code = blake3()
    package = Path(__file__).parents[2]
    for file in sorted((*package.rglob("*.py"), *package.rglob("*.so"))):
        code.update(f"{file.relative_to(package)}\0".encode())
        code.update(blake3(file.read_bytes()).digest())
    return f"{release}+{code.hexdigest(8)}"


class PreparedCache:
    """Reads and writes the entries of a directory, which is created if it is missing.

    No error here stops a server: an unreadable entry is prepared again, an entry that cannot be
    written is not cached, and a directory that others can write to is not used, with one warning.
    ``model`` is shown in listings.
    """

    def __init__(self, directory: Path, model: str = "") -> None:
        self.directory = directory
        self.model = model
        self._refused: set[str] = set()
        self._writable = True
        self._trusted = True
        try:
            directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            if fault := fault_of(directory.stat()):
                self._trusted = self._writable = False
                logger.warning(
                    "Prepared-weights cache: %s %s. It is not used: who can write there decides "
                    "what the server computes.",
                    directory,
                    fault,
                )
        except OSError as error:
            self._stop_writing(error)

    def load(self, key: CacheKey) -> dict[str, torch.Tensor] | None:
        """The mapped tensors of ``key``, verified; None if there is no entry or a corrupt one."""
        path = self.directory / key.name
        if not self._trusted:
            return None
        try:
            with path.open("rb", buffering=0) as stream:
                if fault := fault_of(os.fstat(stream.fileno())):
                    raise EntryError(fault)
                entry = read_entry(stream)
                if entry.key != key.fields:
                    raise EntryError("has weights of another key than its name says")
                verify_entry(stream, entry)
                tensors = map_entry(stream, entry)
                _mark_used(stream.fileno())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            self._stop_writing(error)
            return None
        except (EntryError, OSError, RuntimeError) as error:  # torch's, of a file it cannot map
            self.refuse(key, str(error))
            return None
        return tensors

    def refuse(self, key: CacheKey, reason: str) -> None:
        """Warn once that an entry is corrupt; the next ``store`` replaces it."""
        if key.name not in self._refused:
            self._refused.add(key.name)
            logger.warning(
                "Prepared-weights cache: %s %s. It is ignored and prepared again.",
                self.directory / key.name,
                reason,
            )

    def store(
        self, key: CacheKey, layer: str, descriptor: str, tensors: Mapping[str, torch.Tensor]
    ) -> bool:
        """Write ``tensors``; returns False if that failed, after a warning."""
        path = self.directory / key.name
        if not self._writable:
            return False
        if key.name not in self._refused and path.exists():
            return True  # another server has finished it in the meantime
        label = Label(self.model, layer, descriptor, time.time())
        try:
            _write_atomically(path, key, label, tensors)
        except OSError as error:
            self._stop_writing(error)
            return False
        except ValueError as error:
            logger.warning("Prepared-weights cache: %s is not cached: %s", layer, error)
            return False
        self._refused.discard(key.name)
        return True

    def _stop_writing(self, error: OSError) -> None:
        if not self._writable:
            return
        self._writable = False
        logger.warning(
            "Prepared-weights cache: writing to %s has stopped: %s. The server continues, "
            "and the next start prepares missing entries again.",
            self.directory,
            error,
        )


def _mark_used(descriptor: int) -> None:
    """Set mtime to the time of use, since atime is rarely maintained."""
    try:
        os.utime(descriptor)
    except OSError:  # a file of another user
        return


def _write_atomically(
    path: Path, key: CacheKey, label: Label, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write atomically: readers find no file, the earlier entry, or the complete new one."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
        # No other user reads it either while it is written.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
                if not os.fstat(stream.fileno()).st_nlink:
                    continue  # pruned before it was locked
                write_entry(stream, key.fields, label, tensors)
                stream.flush()
                os.fsync(stream.fileno())
                os.fchmod(stream.fileno(), FILE_MODE)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        break
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
