# SPDX-License-Identifier: Apache-2.0
"""Timing of calls: in turns, in random order, with medians and their spread.

Imported by worker processes too, so it needs torch only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

LONG_CALL_SECONDS = 5e-3
SHORT_CALLS_PER_TURN = 3


@dataclass(frozen=True)
class Elapsed:
    """Seconds of one call: on the wall clock, and of CPU time of the calling thread."""

    wall: float
    cpu: float

    @property
    def counted(self) -> float:
        """CPU time with one thread, so that being scheduled away does not count; else wall."""
        return self.cpu if torch.get_num_threads() == 1 else self.wall


def timed(action: Callable[[], object]) -> Elapsed:
    wall, cpu = time.perf_counter(), time.thread_time()
    action()
    cpu = time.thread_time() - cpu
    return Elapsed(time.perf_counter() - wall, cpu)


def turn(call: Callable[[int], object], first: int) -> list[Elapsed]:
    """Times of a few calls in a row, or of one if it is long.

    Whoever had the core before has left it cold, so a short call is first made once untimed.
    """
    once = timed(lambda: call(first))
    if once.wall > LONG_CALL_SECONDS:
        return [once]
    return [timed(partial(call, first + i)) for i in range(1, 1 + SHORT_CALLS_PER_TURN)]


def best_seconds(action: Callable[[], object], seconds: float) -> float:
    """Shortest of as many runs as fit into ``seconds``, at least two."""
    times = [timed(action).counted for _ in range(2)]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(timed(action).counted)
    return min(times)


class Timeable(Protocol):
    """What ``in_turns`` measures; the numbers count its calls, so that weights can rotate."""

    def turn(self, x: torch.Tensor, first: int) -> list[Elapsed]: ...


def in_turns(
    contenders: Sequence[Timeable], x: torch.Tensor, seconds: float, rounds: int = 5
) -> list[list[Elapsed]]:
    """Times of each contender's calls with ``x``; at least ``rounds`` turns, about ``seconds``.

    Turns are in another order each time: who ran before decides what the caches and the core hold.
    """
    times: list[list[Elapsed]] = [[] for _ in contenders]
    for contender in contenders:
        contender.turn(x, 0)  # some kernels choose and build code at the first x of a shape
    end = time.perf_counter() + seconds
    done = 0
    while done < rounds or time.perf_counter() < end:
        for index in torch.randperm(len(contenders)).tolist():
            calls = SHORT_CALLS_PER_TURN + 1
            times[index] += contenders[index].turn(x, done * calls)
        done += 1
    return times


def summary(times: Sequence[Elapsed]) -> dict[str, Any]:
    """Median, best and spread (distance of the quartiles, of the median) of the counted times."""
    counted = sorted(t.counted for t in times)
    median = statistics.median(counted)
    low, _, high = statistics.quantiles(counted, n=4) if len(counted) > 1 else (median,) * 3
    return {
        "median_ms": median * 1e3,
        "best_ms": counted[0] * 1e3,
        "spread": (high - low) / median,
        "median_wall_ms": statistics.median(t.wall for t in times) * 1e3,
        "calls": len(counted),
    }


def allow_tiles() -> None:
    """Ask the system for AMX tiles where the processor has them. vLLM's 4-bit operator does not,
    and without leave their first use ends the process; in a served model some product of oneDNN has
    asked before."""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
