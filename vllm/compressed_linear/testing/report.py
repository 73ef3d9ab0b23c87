# SPDX-License-Identifier: Apache-2.0
"""Results of the conformance kit, as values and as a table."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm.compressed_linear.testing.case import WeightCase


class ConformanceError(AssertionError):
    """A backend fails a case that it declares to support."""


@dataclass(frozen=True)
class Failure:
    """One failure. ``check``: the name of the check, e.g. ``"M=17"`` or ``"prepare"``."""

    check: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


@dataclass(frozen=True)
class CaseResult:
    """Result of one case. ``declined``: the reasons of ``can_implement``, if it declined.
    ``worst``: largest error, as a fraction of the contract's bound. ``checks``: number of
    checks."""

    case: WeightCase
    description: str
    declined: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()
    worst: float = 0.0
    checks: int = 0

    @property
    def outcome(self) -> str:
        """``"passed"``, ``"declined"`` or ``"failed"``."""
        if self.failures:
            return "failed"
        return "declined" if self.declined else "passed"

    def raise_if_failed(self) -> None:
        """``ConformanceError`` with every failure of this case."""
        if self.failures:
            raise ConformanceError(_describe(self))


@dataclass(frozen=True)
class Report:
    """All results of one backend on one platform; ``print`` shows a table."""

    backend: str
    platform: str
    results: tuple[CaseResult, ...]

    def of(self, outcome: str) -> list[CaseResult]:
        """The results with that ``outcome``."""
        return [r for r in self.results if r.outcome == outcome]

    @property
    def worst(self) -> float:
        """Largest error of all cases, as a fraction of the contract's bound."""
        return max((r.worst for r in self.results), default=0.0)

    @property
    def reasons(self) -> Counter[str]:
        """How many cases were declined for each reason; reasons that differ only in numbers that
        stand in parentheses count as one."""
        return Counter(re.sub(r"\(\d+\)", "(…)", t) for r in self.results for t in r.declined)

    def raise_if_failed(self) -> None:
        """``ConformanceError`` that lists every failure."""
        failed = self.of("failed")
        if failed:
            raise ConformanceError(
                f"{self.backend} failed {len(failed)} of {len(self.results)} cases\n"
                + "\n".join(_describe(r) for r in failed)
            )

    def tables(self) -> Iterable[Table | Text]:
        """Renderables for rich: one line per kind of weight, then failures, then reasons."""
        yield self._overview()
        for result in self.of("failed"):
            yield Text(_describe(result), style="red")
        if self.reasons:
            yield self._declined()

    def _overview(self) -> Table:
        table = Table(title=f"{self.backend} on {self.platform}", title_justify="left")
        for column in ("weights", "passed", "failed", "declined", "checks", "worst / allowed"):
            table.add_column(column, justify="left" if column == "weights" else "right")
        kinds: dict[str, list[CaseResult]] = {}
        for result in self.results:
            kinds.setdefault(_kind(result.case), []).append(result)
        for kind, results in sorted(kinds.items()):
            table.add_row(kind, *_counts(results))
        table.add_section()
        table.add_row("all", *_counts(self.results))
        return table

    def _declined(self) -> Table:
        table = Table(title="declined", title_justify="left")
        table.add_column("cases", justify="right")
        table.add_column("reason")
        for reason, count in self.reasons.most_common():
            table.add_row(str(count), Text(reason))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100, color_system=None).print(*self.tables(), sep="\n")
        return text.getvalue()


def _kind(case: WeightCase) -> str:
    element = case.element
    name = str(element)
    if element.kind == "integer":
        name = f"{element.bits}-bit integers"
    if element.kind == "codebook":
        name = "codebooks"
    return name + (", reordered" if case.order in ("act", "ragged") else "")


def _counts(results: Iterable[CaseResult]) -> tuple[str, ...]:
    results = list(results)
    outcomes = Counter(r.outcome for r in results)
    tried = [r for r in results if r.outcome != "declined"]
    return (
        *(str(outcomes[o] or "·") for o in ("passed", "failed", "declined")),
        str(sum(r.checks for r in results) or "·"),
        f"{max(r.worst for r in tried):.3f}" if tried else "·",
    )


def _describe(result: CaseResult) -> str:
    return f"{result.case} ({result.description})\n" + "\n".join(
        f"  {failure}" for failure in result.failures
    )
