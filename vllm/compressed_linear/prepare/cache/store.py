# SPDX-License-Identifier: Apache-2.0
"""The prepared-weights cache: a directory of files that hold what preparation would give again.

The key of an entry is everything that preparation depends on: the bytes of the checkpoint's tensors
that this rank holds, what they mean and which part of the weight they are, the descriptor with its
refined facts, the backend with its layout and code path, and this very installation. The bytes
themselves and not the files they came from, because names, times and inodes of files do not tell
what a model's own loader made of them, and a wrong reuse would be silent.
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


def cache_key(
    method: QuantLinearMethod, variant: str, part: Part, platform: Platform
) -> CacheKey | None:
    """The key of a part prepared by ``method`` on code path ``variant``.

    None where nothing may be kept: for a backend that names no layout, and for weights that are not
    in the CPU's memory. Reads all of the part's tensors.
    """
    layout = method.layout_version(part.descriptor, platform)
    if layout is None or part.weights.device.type != "cpu":
        return None
    fields = {
        "installation": installation(),
        "backend": method.name,
        "layout": layout,
        "variant": variant,
        "descriptor": part.descriptor.to_json(),
        "shards": [_shard_fields(shard) for shard in part.weights.shards],
    }
    text = json.dumps(fields, sort_keys=True)
    return CacheKey(json.loads(text), blake3(text.encode()).hexdigest() + SUFFIX)


def _shard_fields(shard: LoadedShard) -> dict[str, Any]:
    """What one shard is and holds, all but its name."""
    source = shard.source
    where = {k: v for k, v in vars(source).items() if k not in ("name", "scheme")}
    return where | {
        # Shows every field, also those that schemes learn later.
        "scheme": repr(source.scheme),
        "packings": {name: repr(packing) for name, packing in shard.packings.items()},
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
    """Names this package's version and its code: any change of a file of it is another one."""
    release = version("vllm-compressed-linear")
    code = blake3()
    package = Path(__file__).parents[2]
    for file in sorted((*package.rglob("*.py"), *package.rglob("*.so"))):
        code.update(f"{file.relative_to(package)}\0".encode())
        code.update(blake3(file.read_bytes()).digest())
    return f"{release}+{code.hexdigest(8)}"


class PreparedCache:
    """Reads and writes the entries of a directory, which is made if it is missing.

    Nothing that goes wrong here stops a server: what cannot be read is prepared anew, what cannot
    be written is not kept, and one warning says so. ``model`` is for people who list the entries.
    """

    def __init__(self, directory: Path, model: str = "") -> None:
        self.directory = directory
        self.model = model
        self._refused: set[str] = set()
        self._writable = True
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            self._stop_writing(error)

    def load(self, key: CacheKey) -> dict[str, torch.Tensor] | None:
        """The mapped tensors of ``key``, verified; None when there is no entry or a bad one."""
        path = self.directory / key.name
        try:
            with path.open("rb", buffering=0) as stream:
                entry = read_entry(stream)
                if entry.key != key.fields:
                    raise EntryError("holds other weights than its name says")
                verify_entry(stream, entry)
                tensors = map_entry(stream, entry)
                _mark_used(stream.fileno())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            self._stop_writing(error)
            return None
        except (EntryError, OSError) as error:
            self.refuse(key, str(error))
            return None
        return tensors

    def refuse(self, key: CacheKey, reason: str) -> None:
        """Say once that an entry is bad; the next ``store`` of it replaces it."""
        if key.name not in self._refused:
            self._refused.add(key.name)
            logger.warning(
                "Prepared-weights cache: %s %s. It is not used, and prepared anew.",
                self.directory / key.name,
                reason,
            )

    def store(
        self, key: CacheKey, layer: str, descriptor: str, tensors: Mapping[str, torch.Tensor]
    ) -> bool:
        """Keep ``tensors``; false when that failed, which was said."""
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
            logger.warning("Prepared-weights cache: %s is not kept: %s", layer, error)
            return False
        self._refused.discard(key.name)
        return True

    def _stop_writing(self, error: OSError) -> None:
        if not self._writable:
            return
        self._writable = False
        logger.warning(
            "Prepared-weights cache: nothing more is written to %s: %s. The server runs on, "
            "and the next start prepares again what is missing there.",
            self.directory,
            error,
        )


def _mark_used(descriptor: int) -> None:
    """The time of change says when an entry was used last; that of access is rarely kept."""
    try:
        os.utime(descriptor)
    except OSError:  # somebody else's file
        return


def _write_atomically(
    path: Path, key: CacheKey, label: Label, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Under its name there is nothing, the entry that was there, or all of the new one."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
        with temporary.open("xb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
                if not os.fstat(stream.fileno()).st_nlink:
                    continue  # pruned before it was locked
                write_entry(stream, key.fields, label, tensors)
                stream.flush()
                os.fsync(stream.fileno())
                os.fchmod(stream.fileno(), os.fstat(stream.fileno()).st_mode & 0o444)
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
