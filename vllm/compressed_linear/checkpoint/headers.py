# SPDX-License-Identifier: Apache-2.0
"""Safetensors headers of a checkpoint: names, dtypes and shapes, without reading weights."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from vllm.compressed_linear.checkpoint.bounded_read import read_json_file, shortened
from vllm.compressed_linear.checkpoint.file_header import (
    TensorHeader,
    read_entry,
    read_file_header,
)
from vllm.compressed_linear.checkpoint.shard import CheckpointError

INDEX = "model.safetensors.index.json"
"""Tensor name → file, for checkpoints of several files."""
LONGEST_NAME = 255
"""Bytes of a file's name, on Linux."""


NATURAL_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
"""dtypes of a ``weight`` that holds the numbers themselves; all others hold codes."""


class HoldingModules:
    """Of the modules of a checkpoint, those that have certain tensors, or codes called ``weight``.

    ``modules``: their names, in the order of the files. ``inside``: every module and every parent
    of one → whether it has such a tensor, or a module inside it has.
    """

    def __init__(
        self, modules: Mapping[str, set[str]], tensors: tuple[str, ...], coded: Collection[str]
    ) -> None:
        wanted = frozenset(tensors)
        self.modules = {
            name: None
            for name, own in modules.items()
            if name in coded or not wanted.isdisjoint(own)
        }
        self._all = modules

    @cached_property
    def inside(self) -> Mapping[str, bool]:
        found: dict[str, bool] = {}
        for module in self.modules:
            parent = module
            while parent and parent not in found:
                found[parent] = True
                parent = parent.rpartition(".")[0]
        found.setdefault("", bool(self.modules))
        for module in self._all:
            parent = module
            while parent not in found:
                found[parent] = False
                parent = parent.rpartition(".")[0]
        return found

    @cached_property
    def experts(self) -> Mapping[str, bool]:
        """Numbered layer that holds experts (``model.layers.3``) → whether one of them has such
        tensors."""
        found: dict[str, bool] = {}
        for module in self._all:
            above, dot, _ = f"{module}.".partition(".experts.")
            if dot and (layer := numbered_layer(above)):
                found[layer] = found.get(layer, False) or module in self.modules
        return found


def numbered_layer(module: str) -> str:
    """The innermost parent of ``module`` whose name ends in a number, or itself; "" if none."""
    while module and not module.rpartition(".")[2].isdigit():
        module = module.rpartition(".")[0]
    return module


class Headers(Mapping[str, TensorHeader]):
    """Tensor name → header, over all files of a checkpoint. Immutable, so copies share it: a
    mixture has hundreds of thousands of tensors.

    ``copies``: tensors that several files hold: name in the files → (the file that the index
    means, the others).
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorHeader],
        copies: Mapping[str, tuple[str, tuple[str, ...]]] | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.copies = copies or {}
        self._holding: dict[tuple[str, ...], HoldingModules] = {}
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Headers:
        return self

    @property
    def modules(self) -> Mapping[str, set[str]]:
        """Module name → last parts of its tensors' names."""
        return self._modules

    def holding(self, tensors: tuple[str, ...]) -> HoldingModules:
        """The modules that have a tensor whose name ends with one of ``tensors``, or whose
        ``weight`` is of a dtype of codes. Looked for once for all copies: each rank has a
        quantization config, and asks about all modules."""
        if tensors not in self._holding:
            self._holding[tensors] = HoldingModules(self._modules, tensors, self.coded)
        return self._holding[tensors]

    @cached_property
    def last_words(self) -> Collection[str]:
        """Last parts of the names of all tensors."""
        return set().union(*self._modules.values())

    @cached_property
    def coded(self) -> Collection[str]:
        """Modules whose ``weight`` holds codes, by its dtype."""
        return {
            module: None
            for module, names in self._modules.items()
            if "weight" in names
            and self._tensors[f"{module}.weight" if module else "weight"].dtype
            not in NATURAL_DTYPES
        }

    def renamed(self, names: Mapping[str, str]) -> Headers:
        """The same tensors under other names; names that are not in the mapping stay."""
        return Headers({names.get(k, k): v for k, v in self._tensors.items()}, self.copies)


def read_headers(directory: str | Path) -> Headers | None:
    """Headers of a local directory's safetensors files; None if it has none.

    If there is an index, only the files it names are read, as in vLLM, and it decides which one is
    meant if several hold a tensor of one name. Raises ``CheckpointError`` with the file, and the
    tensor if possible, when a file is missing, truncated or damaged, or if nothing decides.
    """
    path = Path(directory)
    if not path.is_dir():
        return None
    files, indexed = _files(path)
    if not files:
        return None
    key = _version([*files, path / INDEX] if indexed else files)
    if (known := _IN_USE.get(key)) is None:
        with without_collection():
            known = _IN_USE[key] = _read(path, files, indexed)
    return known


def _version(files: Sequence[Path]) -> Any:
    """Changes if a file does; an object that equals no other if one cannot be looked at."""
    try:
        return tuple((str(f), stat.st_size, stat.st_mtime_ns) for f in files if (stat := f.stat()))
    except OSError:  # reading it tells what is wrong
        return object()


_IN_USE: WeakValueDictionary[Any, Headers] = WeakValueDictionary()
"""Headers that are referenced, by the names, sizes and times of their files and index."""


@contextmanager
def without_collection() -> Iterator[None]:
    """Context without garbage collection, for work that makes many small objects: looking for
    cycles among those of a large checkpoint doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read(directory: Path, files: Sequence[Path], indexed: Mapping[str, str]) -> Headers:
    tensors: dict[str, TensorHeader] = {}
    copies: dict[str, list[TensorHeader]] = {}
    for file in files:
        found = read_file_header(file)
        for name in filter(tensors.__contains__, found):
            copies.setdefault(name, [tensors[name]]).append(found[name])
        tensors.update(found)
    for name, same in copies.items():
        tensors[name] = _meant(directory, name, same, indexed)
    decided = {
        name: (meant, tuple(header.file for header in same if header.file != meant))
        for name, same in copies.items()
        for meant in (tensors[name].file,)
    }
    return Headers(tensors, decided)


def _meant(
    directory: Path, name: str, same: Sequence[TensorHeader], indexed: Mapping[str, str]
) -> TensorHeader:
    """The header, of several for one name, that is in the file of the index."""
    for header in same:
        if name in indexed and header.file == str(directory / indexed[name]):
            return header
    files = " and ".join(header.file for header in same)
    index = f"{INDEX} does not say which one is meant" if indexed else f"there is no {INDEX}"
    raise CheckpointError(
        f"{files} both hold {name}, and {index}; vLLM would take whichever it reads last. Move the "
        "files that are not meant to another directory"
    )


def headers_of(entries: Mapping[str, Mapping[str, Any]], origin: str) -> Headers:
    """Parse header entries of safetensors files; ``origin`` is for messages."""
    return Headers({name: read_entry(origin, name, entry) for name, entry in entries.items()})


def _files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files to be read, and the index: tensor → file; empty if there is none."""
    index = directory / INDEX
    if not index.is_file():
        return sorted(directory.glob("*.safetensors")), {}
    found = read_json_file(index, "the index of tensors")
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: not an index of tensors: no map called weight_map, or nothing in it"
        )
    for name, file in weight_map.items():
        _check_file_name(index, name, file)
    first_tensor = {file: name for name, file in reversed(weight_map.items())}
    for file, name in first_tensor.items():
        if not (directory / file).exists():
            raise CheckpointError(
                f"{directory / file} is missing; {INDEX} says that it holds {name}"
            )
    return sorted(directory / file for file in first_tensor), weight_map


def _check_file_name(index: Path, tensor: str, file: Any) -> None:
    """Raise unless an index names a file of its own directory: vLLM reads no others, and a path
    could lead anywhere."""
    if (
        not isinstance(file, str)
        or Path(file).name != file
        or not file.isprintable()
        or not file.endswith(".safetensors")
        or len(file.encode()) > LONGEST_NAME
        or not tensor.isprintable()
    ):
        raise CheckpointError(
            f"{index}: tensor {shortened(tensor)} is said to be in {shortened(file)}, expected the "
            "name of a .safetensors file in the same directory"
        )


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
