# SPDX-License-Identifier: Apache-2.0
"""From measured rates of instructions to the profile of a processor.

Rates choose among the published profiles. One that is far from what its profile says replaces it,
in coarse steps, so that small differences between two measurements change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.profiles import PROFILES, Profile, Rate, plain_profile

CLOCK = "clock"
"""Name of the cycles a second among the rates."""
FAR = 1.25
"""A measured rate that is this many times higher or lower than the profile's replaces it."""
STEP = 1.1
"""Steps of rates that replace others."""

Measure = Callable[[], Mapping[str, float]]
"""Instruction of ``profiles.INSTRUCTIONS`` → executions a cycle; ``CLOCK`` → cycles a second."""


def measure() -> dict[str, float]:
    """Rates of the core that this runs on, in at most 50 ms."""
    native.load()
    lines = str(torch.ops.compressed_linear.measure_rates()).splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines)}


def fitted(
    measured: Mapping[str, float], cpu: str, machine: str, features: frozenset[str]
) -> Profile:
    """The profile of a processor called ``cpu`` (``limits.cpu_name``) with ``features``, on which
    ``measured`` was measured: the nearest, with what is far from it replaced.

    A virtual machine may hide features of the processor, so that profiles with more fit, too."""
    fitting = [p for p in PROFILES.values() if p.machine == machine and features <= p.features]

    def order(profile: Profile) -> tuple[float, bool, int, bool]:
        known = bool(profile.known_as) and cpu.endswith(profile.known_as)
        surplus = len(profile.features - features)
        return round(_distance(profile, measured), 1), not known, surplus, not profile.known_as

    nearest = min(fitting, key=order) if fitting else plain_profile(machine, features)
    found = nearest.with_rates(
        {
            name: Rate(_stepped(rate.value, measured[name]), "measured")
            for name, rate in nearest.rates
            if name in measured and _far(rate.value, measured[name])
        }
    )
    if CLOCK in measured and _far(found.clock, measured[CLOCK]):
        found = replace(found, clock=_stepped(found.clock, measured[CLOCK]), by_name={})
    return found


def _distance(profile: Profile, measured: Mapping[str, float]) -> float:
    """Mean factor, as a logarithm, between the rates that both have."""
    both = [
        abs(math.log(measured[name] / rate.value))
        for name, rate in profile.rates
        if name in measured
    ]
    return sum(both) / len(both) if both else 0.0


def _far(known: float, measured: float) -> bool:
    return not 1 / FAR <= measured / known <= FAR


def _stepped(known: float, measured: float) -> float:
    """The step from ``known`` that is nearest to ``measured``."""
    steps = round(math.log(measured / known) / math.log(STEP))
    return float(known * STEP**steps)
