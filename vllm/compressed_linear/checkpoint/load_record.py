# SPDX-License-Identifier: Apache-2.0
"""Record of one load: which bytes of which parameters were written, from which of a file's tensors.

Loaders of models cut, fuse, reorder and convert tensors in their own ways, so nothing is asked of
them: the record observes PyTorch's operators. Meta tensors are recorded like others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_REPLACING = ("copy_", "fill_", "zero_")
"""In-place operators whose result does not depend on what was there before."""


@dataclass(frozen=True)
class Footprint:
    """The bytes of a strided tensor within its storage.

    ``outer``: (count, stride in bytes) of the axes that are not contiguous, the largest stride
    first; each combination is a run of ``run`` bytes.
    """

    first: int
    outer: tuple[tuple[int, int], ...]
    run: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Footprint:
        size = tensor.element_size()
        axes = sorted(
            (
                (stride * size, count)
                for stride, count in zip(tensor.stride(), tensor.shape, strict=True)
                if count != 1 and stride != 0
            ),
            reverse=True,
        )
        run = size
        while axes and axes[-1][0] == run:
            run *= axes.pop()[1]
        first = int(tensor.storage_offset()) * size
        return cls(first, tuple((count, stride) for stride, count in axes), run)

    @property
    def nbytes(self) -> int:
        total = self.run
        for count, _ in self.outer:
            total *= count
        return total

    @property
    def end(self) -> int:
        """One beyond the last byte."""
        return self.first + sum((count - 1) * stride for count, stride in self.outer) + self.run

    def meets(self, other: Footprint) -> bool:
        """Whether the spans of both overlap."""
        return self.first < other.end and self.end > other.first

    def starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """First byte of every run, int64."""
        out = np.array([self.first], dtype=np.int64)
        for count, stride in self.outer:
            out = (out[:, None] + np.arange(count, dtype=np.int64) * stride).ravel()
        return out


def _gaps(wanted: Footprint, written: Iterable[Footprint]) -> list[tuple[int, int]]:
    """Byte ranges [start, stop) of ``wanted`` that no write covers, ascending."""
    near = [w for w in written if w.meets(wanted)]
    if wanted in near:
        return []
    starts = np.concatenate([w.starts() for w in near]) if near else np.empty(0, np.int64)
    stops = starts + np.repeat(
        np.array([w.run for w in near], dtype=np.int64),
        np.array([w.nbytes // w.run for w in near], dtype=np.int64),
    )
    order = np.argsort(starts, kind="stable")
    starts, reached = starts[order], np.maximum.accumulate(stops[order])
    begins = np.flatnonzero(np.concatenate([[True], starts[1:] > reached[:-1]])[: len(starts)])
    ends = np.concatenate([begins[1:], [len(starts)]])[: len(begins)] - 1
    merged = list(zip(starts[begins].tolist(), reached[ends].tolist(), strict=True))
    found = []
    position = 0
    for start in np.sort(wanted.starts()).tolist():
        stop, at = start + wanted.run, start
        while at < stop:
            while position < len(merged) and merged[position][1] <= at:
                position += 1
            begin, end = merged[position] if position < len(merged) else (stop, stop)
            if begin > at:
                found.append((at, min(begin, stop)))
            at = max(at, end) if begin < stop else stop
    return found


@dataclass(frozen=True)
class Fill:
    """What filled one parameter. ``gaps``: byte ranges [start, stop), from the parameter's first
    byte, that nothing was written to; ``names``: tensors of the files that were written to it."""

    nbytes: int
    gaps: tuple[tuple[int, int], ...]
    names: tuple[str, ...]

    def of_first(self, nbytes: int) -> Fill:
        """The same for a parameter that ends after ``nbytes``."""
        gaps = tuple((start, min(stop, nbytes)) for start, stop in self.gaps if start < nbytes)
        return Fill(nbytes, gaps, self.names)

    @property
    def missing(self) -> int:
        """Number of bytes that nothing was written to."""
        return sum(stop - start for start, stop in self.gaps)


@dataclass
class _Storage:
    """One storage: which footprint has values of which tensors of the files, which may be none.

    ``reference`` keeps the storage's address from being used for another one.
    """

    reference: StorageWeakRef
    target: bool
    contents: dict[Footprint, frozenset[str]] = field(default_factory=dict)

    def names(self, tensor: torch.Tensor) -> frozenset[str]:
        if len(self.contents) == 1:
            return next(iter(self.contents.values()))
        asked = Footprint.of(tensor)
        return frozenset().union(
            *(names for where, names in self.contents.items() if where.meets(asked))
        )

    def add(self, tensor: torch.Tensor, names: frozenset[str]) -> None:
        if not tensor.numel():
            return
        where = Footprint.of(tensor)
        self.contents[where] = self.contents.get(where, frozenset()) | names


class LoadRecord(TorchDispatchMode):
    """Context in which writes to ``targets`` are recorded, by their storages.

    ``weights`` passes the tensors of files on to the model. Parameters that share a storage, such
    as those of tied layers, share what was written.
    """

    def __init__(self, targets: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        """Tensors of the files that were given to the model: dtype and shape by name."""
        self.current = ""
        """Name of the tensor that was given last."""
        self.taken: set[str] = set()
        """Tensors of which at least a part was written to a target."""
        self.zero_biases: set[str] = set()
        """Biases without effect. Some tools write one for each layer."""
        self.unread_biases: set[str] = set()
        """Biases of which that is not known: meta tensors."""
        self._storages: dict[int, _Storage] = {}
        for tensor in targets:
            self._storage(tensor, target=True)

    def weights(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors; from now on it is known where each one goes."""
        for name, tensor in weights:
            self.held[name] = (tensor.dtype, tuple(tensor.shape))
            self.current = name
            self._storage(tensor).add(tensor, frozenset((name,)))
            if name.endswith(".bias"):
                if tensor.is_meta:
                    self.unread_biases.add(name)
                elif not tensor.any():
                    self.zero_biases.add(name)
            yield name, tensor

    def fill(self, parameter: torch.Tensor) -> Fill | None:
        """What was written to ``parameter``. None if it is not a target: a loader assigned it, and
        what it was made of counts as taken."""
        storage = self._storages.get(_key(parameter))
        if storage is None:
            return None
        if not storage.target:
            self.taken |= storage.names(parameter)
            return None
        wanted = Footprint.of(parameter)
        gaps = _gaps(wanted, storage.contents)
        return Fill(
            wanted.nbytes,
            tuple((start - wanted.first, stop - wanted.first) for start, stop in gaps),
            tuple(sorted(storage.names(parameter))) if storage.contents else (),
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            result = args[0]  # there are no values, and the parameter keeps its own
        else:
            result = func(*args, **kwargs)
        written: list[torch.Tensor] = []
        for position, argument in _written(func):
            value = args[position] if position < len(args) else kwargs.get(argument)
            written += _tensors((value,))
        replaced = func._schema.name.endswith(_REPLACING)
        names: frozenset[str] = frozenset()
        inputs = list(_tensors((*args, *kwargs.values())))
        for tensor in inputs:
            if not (replaced and tensor is written[0]):
                storage = self._storages.get(_key(tensor))
                if storage is not None and storage.contents:
                    names |= storage.names(tensor)
        for tensor in written:
            if names or (replaced and _key(tensor) in self._storages):
                storage = self._storage(tensor)
                storage.add(tensor, names)
                if storage.target:
                    self.taken |= names
        if names and not written:
            known = {_key(tensor) for tensor in inputs}
            for tensor in _tensors((result,)):
                if _key(tensor) not in known:
                    self._storage(tensor).add(tensor, names)
        return result

    def _storage(self, tensor: torch.Tensor, *, target: bool = False) -> _Storage:
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key not in self._storages:
            reference = StorageWeakRef(storage)
            self._storages[key] = _Storage(reference, target)
        return self._storages[key]


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operator writes to."""
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
