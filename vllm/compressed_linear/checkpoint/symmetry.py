# SPDX-License-Identifier: Apache-2.0
"""Zero points in a file whose configuration says that it has none (``sym: true``).

Tools disagree about what such a file holds: the middle code, the middle code less 1 (GPTQ v1), all
zeros, or no tensor at all; and the configuration may name the version of another tool. One such
value throughout marks a symmetric weight. Zero points that vary are those of an asymmetric
quantizer: they are used as stored if they fit the version that the configuration states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

Counts = Mapping[int, int]
"""Stored value → number of times that a whole tensor, the parts of all ranks, has it."""


@dataclass(frozen=True)
class ZeroReading:
    """``middle``: all zero points are the middle code, whatever the file stores. ``note``: a line
    for the plan. ``error``: why the zero points cannot be used."""

    middle: bool
    note: str = ""
    error: str = ""


def read_zeros(setting: str, bits: int, bump: int, counts: Counts) -> ZeroReading:
    """Meaning of the zero points of a weight of ``bits`` that ``setting`` calls symmetric.

    ``bump``: what the stated version adds to a stored value (1 for GPTQ v1). ``counts``: of the
    stored values; empty if they are not codes.
    """
    middle = 1 << (bits - 1)
    stated = middle - bump
    says = f"the configuration says {setting}"
    remedy = "change that setting if they are meant, else the file is damaged"
    if not counts:
        return ZeroReading(False)
    if len(counts) == 1:
        (value,) = counts
        if value == stated:
            return ZeroReading(True)
        if value in (0, middle - 1, middle):
            return ZeroReading(
                True,
                f"symmetric, as {says}: zero points are stored as {value} throughout, "
                f"where {stated} is expected",
            )
        return ZeroReading(
            False,
            error=f"zero points are stored as {value} throughout, but {says}, expected {stated}; "
            + remedy,
        )
    found = f"{min(counts)} to {max(counts)}"
    mean, deviation = _mean_zero(counts, bump, 1 << bits)
    # Weights are as often negative as positive, so zero points are about (2^bits − 1) / 2 on
    # average, and the middle code where they are not calculated. Another version is 1 away.
    distance = max(mean - middle, middle - 0.5 - mean, 0)
    if distance > 0.25 + 3 * deviation:
        return ZeroReading(
            False,
            error=f"zero points are stored as {found}, {mean:.2f} on average, but {says}, and the "
            f"version that it states has {middle - 0.5:g} to {middle} on average; " + remedy,
        )
    return ZeroReading(False, f"zero points are stored as {found} and used, although {says}")


def _mean_zero(counts: Counts, bump: int, codes: int) -> tuple[float, float]:
    """Mean of the zero points that ``counts`` of stored values mean, and its standard deviation."""
    total = sum(counts.values())
    points = [((value + bump) % codes, count) for value, count in counts.items()]
    mean = sum(point * count for point, count in points) / total
    variance = sum((point - mean) ** 2 * count for point, count in points) / total
    return mean, math.sqrt(variance / total)
