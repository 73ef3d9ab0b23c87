# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing of calls until the medians converge; measurement of a machine's limits."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Clock = Callable[[], float]
"""Seconds since some moment."""

FEWEST_CALLS = 3
PRECISION = 0.03
"""Stop when the 95 % interval of a median is within ± this fraction of it."""

BEHIND = 1.5
"""... or when the lower end of the interval is this many times the best median."""


@dataclass(frozen=True)
class Timing:
    """Median of ``calls`` times in seconds, and its 95 % confidence interval."""

    median: float
    low: float
    high: float
    calls: int

    @property
    def spread(self) -> float:
        """Half of the interval as a fraction of the median."""
        return (self.high - self.low) / 2 / self.median if self.median > 0 else 0.0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Order-statistic interval, independent of the distribution: the number of values below the
        median is binomial."""
        ordered, n = sorted(seconds), len(seconds)
        outside = max(int((n - 1.96 * n**0.5) / 2), 0)
        return cls(statistics.median(ordered), ordered[outside], ordered[n - 1 - outside], n)


def clock(threads: int) -> Clock:
    """CPU time of the calling thread if it does all the work, so that preemption does not count;
    else wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def device_clock() -> Clock:
    """Wall time after synchronization with the GPU."""

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def captured(call: Callable[[int], object], calls: int) -> torch.cuda.CUDAGraph:
    """CUDA graph of ``calls`` calls, the i-th of which is ``call(i)``, captured once.

    Servers replay graphs, and the overhead of a call from Python exceeds the time of most layers.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(calls):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return graph


def measure(
    calls: Sequence[Callable[[int], object]], *, budget: float, now: Clock, seed: int = 0
) -> list[Timing]:
    """Time each of ``calls``, given the number of the round, in rounds of random order, so that
    disturbances affect all of them.

    Ends when every median is known to ``PRECISION`` or ``BEHIND`` the best, or when the rounds
    together took ``budget`` seconds; never before ``FEWEST_CALLS``.
    """
    order = random.Random(seed)
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call(0)
    spent = 0.0
    while True:
        for index in order.sample(range(len(calls)), len(calls)):
            begin = now()
            calls[index](len(taken[index]) + 1)
            elapsed = now() - begin
            taken[index].append(elapsed)
            spent += elapsed
        found = [Timing.of(seconds) for seconds in taken]
        enough = found[0].calls >= FEWEST_CALLS
        if enough and (spent >= budget or all(_settled(t, found) for t in found)):
            return found


def _settled(timing: Timing, others: Sequence[Timing]) -> bool:
    best = min(other.high for other in others)
    # Three equal values may be chance, so precision needs more values than BEHIND does.
    precise = timing.calls > 2 * FEWEST_CALLS and timing.spread <= PRECISION
    return precise or timing.low > BEHIND * best


def best_rate(work: float, action: Callable[[], object], *, seconds: float, now: Clock) -> float:
    """Highest rate (``work`` per second) of the runs of ``action`` in ``seconds``, at least two."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken) < seconds:
        begin = now()
        action()
        taken.append(now() - begin)
    return work / max(min(taken), 1e-9)


def read_rate(nbytes: int, *, seconds: float, now: Clock, device: str = "cpu") -> float:
    """Bytes per second read from the memory of ``device``, over ``nbytes``, beyond all caches."""
    block = torch.ones(max(nbytes // 4, 1), device=device)
    ways = (lambda: torch.dot(block, block), lambda: block.sum(), lambda: block.max())
    return max(best_rate(4.0 * len(block), way, seconds=seconds / 3, now=now) for way in ways)


def multiply_rates(
    size: int, *, seconds: float, now: Clock, device: str = "cpu"
) -> dict[str, float]:
    """Operations per second of torch's products of ``size`` × ``size`` matrices, by arithmetic."""
    wide = torch.randn(size, size, device=device)
    narrow = wide.bfloat16()
    whole = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    ways: dict[str, Callable[[], object]] = {
        "fp32": lambda: torch.nn.functional.linear(wide, wide),
        "bf16": lambda: torch.nn.functional.linear(narrow, narrow),
        "int8": lambda: torch._int_mm(whole, whole),
    }
    work = 2.0 * size**3
    return {
        name: best_rate(work, way, seconds=seconds / len(ways), now=now)
        for name, way in ways.items()
    }
