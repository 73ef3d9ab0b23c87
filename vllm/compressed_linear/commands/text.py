# SPDX-License-Identifier: Apache-2.0
"""Formatting of names and sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""Matches the layer index in a module name."""


UNTESTED = "untested on hardware"
"""The mark of backends that have never run on hardware such as the platform's."""


def compress_names(names: Sequence[str]) -> str:
    """``a.0.b``, ``a.1.b``, ``a.3.b`` → ``a.{0-1,3}.b``. All names must have the same words."""
    if len(names) == 1:
        return names[0]
    slots = [tuple(map(int, NUMBER.findall(name))) for name in names]
    values = [sorted(set(column)) for column in zip(*slots, strict=True)]
    total = 1
    for column in values:
        total *= len(column)
    if total != len(names):
        return f"{names[0]} and {len(names) - 1} more"
    pieces = iter(values)

    def piece(match: re.Match[str]) -> str:
        column = next(pieces)
        return str(column[0]) if len(column) == 1 else "{" + _ranges(column) + "}"

    return NUMBER.sub(piece, names[0])


def _ranges(numbers: Sequence[int]) -> str:
    out: list[list[int]] = []
    for number in numbers:
        if out and number == out[-1][1] + 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def size(nbytes: int | None) -> str:
    """Format a size with three digits: 1536 → ``1.50 KiB``."""
    if nbytes is None:
        return "?"
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000 or unit == "GiB":
            break
        value /= 1024
    digits = 0 if unit == "B" or value >= 99.5 else 1 if value >= 9.95 else 2
    return f"{value:.{digits}f} {unit}"
