# SPDX-License-Identifier: Apache-2.0
"""When measuring stops and what it says, on a clock that calls move by hand."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from vllm.compressed_linear.machine import timing
from vllm.compressed_linear.machine.timing import Timing, measure


class Hand:
    """A clock, and calls that take a given time of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: Callable[[int], float]) -> Callable[[int], None]:
        def run(number: int) -> None:
            self.log.append((name, number))
            self.now += seconds(number)

        return run

    def count(self, name: str) -> int:
        return sum(who == name for who, _ in self.log)


def test_steady_calls_need_few_rounds() -> None:
    clock = Hand()
    calls = [clock.call("a", lambda i: 1.0), clock.call("b", lambda i: 1.1)]
    a, b = measure(calls, budget=1000, now=clock)
    assert (a.median, b.median) == pytest.approx((1.0, 1.1))
    assert a.spread == pytest.approx(0)
    assert a.calls == b.calls == 7


def test_the_first_call_is_not_counted() -> None:
    clock = Hand()
    (found,) = measure([clock.call("a", lambda i: 100.0 if i == 0 else 1.0)], budget=9, now=clock)
    assert found.median == pytest.approx(1.0)
    assert found.high == pytest.approx(1.0)


def test_noise_is_measured_longer_until_the_budget_ends() -> None:
    noise = random.Random(1)
    clock = Hand()
    (found,) = measure([clock.call("a", lambda i: noise.uniform(1, 3))], budget=60, now=clock)
    assert 20 <= found.calls <= 60
    assert 1.5 < found.median < 2.5
    assert found.low < found.median < found.high
    mild = Hand()
    (known,) = measure([mild.call("a", lambda i: noise.gauss(1, 0.05))], budget=1e6, now=mild)
    assert known.spread <= timing.PRECISION
    assert 7 <= known.calls < 1000


def test_who_is_far_behind_needs_no_precision() -> None:
    noise = random.Random(2)
    clock = Hand()
    calls = [
        clock.call("steady", lambda i: 1.0),
        clock.call("slow", lambda i: noise.uniform(20, 40)),
    ]
    steady, slow = measure(calls, budget=1e9, now=clock)
    assert steady.calls == slow.calls == 7
    assert slow.low > timing.BEHIND * steady.high


def test_no_budget_still_means_a_few_calls_of_each_in_turns() -> None:
    clock = Hand()
    calls = [clock.call(name, lambda i: 5.0) for name in "abc"]
    found = measure(calls, budget=0, now=clock)
    assert [t.calls for t in found] == [timing.FEWEST_CALLS] * 3
    rounds = [clock.log[i : i + 3] for i in range(0, len(clock.log), 3)]
    assert [{number for _, number in r} for r in rounds] == [{0}, {1}, {2}, {3}]
    assert all({name for name, _ in r} == set("abc") for r in rounds)


def test_the_order_of_turns_changes_but_can_be_repeated() -> None:
    def order(seed: int) -> list[tuple[str, int]]:
        clock = Hand()
        measure([clock.call(n, lambda i: 1.0) for n in "abcd"], budget=0, now=clock, seed=seed)
        return clock.log

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(3)
    inside = 0
    for _ in range(1000):
        found = Timing.of([draw.expovariate(1.0) for _ in range(25)])
        inside += found.low <= 0.6931 <= found.high
    assert inside >= 930


def test_rates_are_those_of_the_best_run() -> None:
    clock = Hand()
    times = iter([2.0, 1.0, 4.0, 4.0])
    action = clock.call("a", lambda i: next(times))
    assert timing.best_rate(10, lambda: action(0), seconds=5, now=clock) == pytest.approx(10)
    assert clock.count("a") == 3


def test_the_machine_s_rates_are_measured() -> None:
    clock = timing.clock(1)
    assert timing.read_rate(1 << 16, seconds=0, now=clock) > 0
    rates = timing.multiply_rates(32, seconds=0, now=clock)
    assert set(rates) == {"fp32", "bf16", "int8"}
    assert all(rate > 0 for rate in rates.values())
