# SPDX-License-Identifier: Apache-2.0
"""How many copies of its weights a contender rotates through, so that no call finds them cached.

A server's last-level cache may have hundreds of MiB, and some kernels take a second to pack a
layer, so memory and time bound the number. A result then says that weights may lie in the cache.
Imported by worker processes too, so it needs the standard library only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

CACHE_MULTIPLE = 2
"""Weights of one contender together, in units of the last-level cache, where bounds allow it. The
other contenders, which have their turns in between, read as much again."""

SURE_MULTIPLE = 2
"""Where less is read between two uses of a copy, it may still lie in the cache: what is evicted
need not be the oldest."""

UNEQUAL_TURNS = 4
"""A contender has at most so many calls in its turn for one of another."""

MEMORY_SHARE = 8
"""One contender takes at most this part (one eighth) of the memory that is available."""

PREPARE_SECONDS = 8.0
"""Time for the copies of one contender."""


def wanted_copies(size: int, cache: int, memory: int) -> int:
    """Copies of ``size`` bytes for a last-level cache of ``cache`` bytes, as far as ``memory``
    bytes, those that are available, allow; at least 2."""
    wanted = math.ceil(CACHE_MULTIPLE * cache / size) + 1
    return max(min(wanted, memory // MEMORY_SHARE // size), 2)


def may_be_cached(copies: int, size: int, others: int, cache: int) -> bool:
    """Whether calls may find some of their weights in the cache: too little is read between two
    uses of one of ``copies`` of ``size`` bytes, its own other copies and the weights of the other
    contenders, ``others`` bytes for one call of each."""
    return (copies - 1) * (size + others / UNEQUAL_TURNS) < SURE_MULTIPLE * cache


def repeated(
    make: Callable[[], T], most: Callable[[T], int], seconds: float = PREPARE_SECONDS
) -> tuple[T, ...]:
    """At least two results of ``make`` and up to ``most`` of the first one, none begun ``seconds``
    after it."""
    end = time.perf_counter() + seconds
    made = [make(), make()]
    while len(made) < most(made[0]) and time.perf_counter() < end:
        made.append(make())
    return tuple(made)
