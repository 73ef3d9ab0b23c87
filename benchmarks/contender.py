# SPDX-License-Identifier: Apache-2.0
"""One implementation of a layer in this process, with weights that never lie in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.machine import available_bytes, cache_bytes
from benchmarks.rotation import repeated, wanted_copies
from benchmarks.timing import Elapsed, turn

Tensors = Mapping[str, torch.Tensor]


def nbytes(tensors: Tensors) -> int:
    """Bytes of all of them."""
    return sum(t.nbytes for t in tensors.values())


def copies_for(size: int) -> int:
    """How many copies of ``size`` bytes a contender rotates through on this machine, time apart."""
    return wanted_copies(size, cache_bytes(), available_bytes())


@dataclass(frozen=True)
class Contender:
    """``call(x, tensors)`` runs the layer on one of ``copies``.

    ``tolerance``: largest error relative to the largest output, for the check before timing.
    """

    name: str
    call: Callable[[torch.Tensor, Tensors], torch.Tensor]
    copies: tuple[Tensors, ...]
    tolerance: float = 0.02

    @classmethod
    def prepared(
        cls,
        name: str,
        call: Callable[[torch.Tensor, Tensors], torch.Tensor],
        prepare: Callable[[], Tensors],
        tolerance: float = 0.02,
    ) -> Contender:
        """Prepares every copy anew: cloning might not give the memory that preparation gives."""
        copies = repeated(prepare, lambda first: copies_for(nbytes(first)))
        return cls(name, call, copies, tolerance)

    @property
    def weight_bytes(self) -> int:
        return nbytes(self.copies[0])

    @property
    def number_of_copies(self) -> int:
        return len(self.copies)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x, self.copies[0])

    def warm_up(self, x: torch.Tensor) -> None:
        for tensors in self.copies:
            self.call(x, tensors)

    def turn(self, x: torch.Tensor, first: int) -> list[Elapsed]:
        """See ``timing.turn``; call i uses copy i."""
        return turn(lambda i: self.call(x, self.copies[i % len(self.copies)]), first)
