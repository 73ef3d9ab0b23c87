# SPDX-License-Identifier: Apache-2.0
"""Formatting of names and sizes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""Matches the layer index in a module name."""


UNTESTED = "untested on hardware"
"""The mark of backends that have never run on hardware such as the platform's."""


def without_numbers(text: str) -> str:
    """``text`` with ``#`` for the numbers in module names."""
    return NUMBER.sub("#", text)


def alike(messages: Sequence[str]) -> list[str]:
    """Messages, of which those that differ only in numbers of layers are one."""
    same: dict[str, list[str]] = {}
    for message in messages:
        same.setdefault(without_numbers(message), []).append(message)
    return [
        found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1} layers like it)"
        for found in same.values()
    ]


def compress_names(names: Sequence[str]) -> str:
    """``a.0.b``, ``a.1.b``, ``a.3.b`` → ``a.{0-1,3}.b``. All names must have the same words."""
    names = list(dict.fromkeys(names))
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
        return str(column[0]) if len(column) == 1 else "{" + _in_braces(column) + "}"

    return NUMBER.sub(piece, names[0])


def compress_all(names: Sequence[str]) -> list[str]:
    """``compress_names`` of any names, those with the same words together."""
    same: dict[str, list[str]] = {}
    for name in names:
        same.setdefault(without_numbers(name), []).append(name)
    return [compress_names(found) for found in same.values()]


MOST_RANGES = 6
"""Up to this many ranges of numbers are listed if they repeat regularly."""


def ranges(numbers: Sequence[int]) -> list[str]:
    """``1, 2, 3, 5`` → ``1-3``, ``5``."""
    return [str(a) if a == b else f"{a}-{b}" for a, b in _runs(numbers)]


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    out: list[list[int]] = []
    for number in numbers:
        if out and number == out[-1][1] + 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return out


def _in_braces(numbers: Sequence[int]) -> str:
    texts, runs = ranges(numbers), _runs(numbers)
    steps = {(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(runs)}
    if len(runs) > MOST_RANGES and len(steps) == 1:
        texts = [*texts[:2], "…", texts[-1]]
    return ",".join(texts)


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
