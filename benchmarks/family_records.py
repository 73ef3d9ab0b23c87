# SPDX-License-Identifier: Apache-2.0
"""The records of one family of processors, and what is read off several of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.markdown import Report, reports
from benchmarks.table import ours_of, row


@dataclass(frozen=True)
class Figure:
    """What was measured. ``met``: whether that is the target."""

    text: str
    met: bool


@dataclass(frozen=True)
class Records:
    """The records of one family, in its folder ``directory``."""

    directory: Path

    @cached_property
    def _linear(self) -> dict[str, Report]:
        return {r["scheme"]: r for r in reports(self.directory / "linear", threads=1)}

    def linear(self, scheme: str) -> Report | None:
        """One layer of this kind, one thread, kernels as they are chosen."""
        return self._linear.get(scheme)

    def linears(self, *schemes: str) -> Iterator[Report]:
        """Those of ``schemes`` that were measured."""
        return (self._linear[scheme] for scheme in schemes if scheme in self._linear)

    def forced(self, scheme: str, isa: str, when: str = "linear") -> Report | None:
        """The kernels for ``isa``; with "before" of the commit that gains are measured from."""
        found = reports(self.directory / when, threads=1, forced=True)
        return next((r for r in found if (r["scheme"], r["forced_isa"]) == (scheme, isa)), None)

    def other(self, name: str) -> Report | None:
        """A record of another kind by its file."""
        file = self.directory / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    @cached_property
    def counts(self) -> dict[str, str]:
        """Why targets are missed, by key."""
        return self.other("counts") or {}

    @property
    def has_tiles(self) -> bool:
        """Whether the processor multiplies tiles."""
        return any(
            product["name"].startswith("tile")
            for report in self._linear.values()
            for product in report["limits"]["products"]
        )


def result_of(report: Report, key: str) -> dict[str, Any] | None:
    """The result with this id."""
    return next((result for result in report["results"] if result["id"] == key), None)


def ms_of(report: Report, m: int, key: str = "") -> float | None:
    """Median for M = ``m`` of the result ``key``, or of our preferred one."""
    result = result_of(report, key) if key else next(iter(ours_of(report)), None)
    found = None if result is None else row(result, m)
    return None if found is None else float(found["median_ms"])


def ratios(report: Report, ms: tuple[int, ...], key: str, *, ours: str = "") -> dict[int, float]:
    """How many times as fast as the result ``key`` ours is, for those M that both have."""
    found = {}
    for m in ms:
        mine, other = ms_of(report, m, ours), ms_of(report, m, key)
        if mine is not None and other is not None:
            found[m] = other / mine
    return found
