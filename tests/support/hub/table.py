# SPDX-License-Identifier: Apache-2.0
"""What `explain` says of published checkpoints, as the tables of docs/published-checkpoints.md.

    python -m tests.support.hub.table

writes them anew, in half an hour. Files of full size are written as headers; nothing is downloaded.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tests.support.explained import explained
from tests.support.hub.checkpoints import published, write_headers
from tests.support.hub.selection import NotWrittenError, Published
from tests.support.no_torchvision import torchvision_or_stand_in
from tests.support.repository import ROOT
from vllm.compressed_linear.commands.explain.checkpoint import ExplainError
from vllm.compressed_linear.commands.explain.explanation import Explanation, PartPlan
from vllm.compressed_linear.formats.base import quant_method_of
from vllm.compressed_linear.formats.registry import formats, why_not_read
from vllm.compressed_linear.formats.resolution import ConfigError

PAGE = ROOT / "docs" / "published-checkpoints.md"
PLATFORM = "cpu:zen4"
GPUS = ("cuda:90", "cuda:100")
TRIVIAL = (
    "embedding tables are only looked up",
    "not quantize",
    "builds it without a quantization config",
    "the model reads its weight itself",
)
"""Reasons to leave to vLLM what is not quantized; if it were, it would be refused."""
LONGEST = 160
LONGEST_REASON = 400
"""Of why a whole checkpoint is left to others."""

CPU_HEAD = (
    "checkpoint",
    "architecture",
    "method",
    "quantized layers",
    "plain layers",
    "left to vLLM",
    "refused",
)
GPU_HEAD = ("quantized layers of", "H100 (`cuda:90`)", "B200 (`cuda:100`)")


@dataclass(frozen=True)
class Row:
    """What the page says of one checkpoint. ``cpu``: the cells after those of its name and method.
    ``gpus``: what runs quantized layers on each of ``GPUS``; empty where the first table says why
    there is none."""

    name: str
    architecture: str
    method: str
    cpu: tuple[str, str, str, str]
    gpus: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Its lines of the tables."""
        lines = [_line(self.name, self.architecture, self.method, *self.cpu)]
        return [*lines, _line(self.name, *self.gpus)] if any(self.gpus) else lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def row(one: Published, path: Path) -> Row:
    """Writes the checkpoint at ``path``."""
    method = str(one.quantization.get("quant_method") or "–")
    try:
        write_headers(one, path)
    except Exception as error:  # no writer, or the library has no such class or cannot build it
        return Row(one.name, one.architecture, method, _not_written(one, error))
    gpus = tuple(_on_gpu(path, platform) for platform in GPUS)
    return Row(one.name, one.architecture, method, _on_cpu(path), gpus)


def _not_written(one: Published, error: Exception) -> tuple[str, str, str, str]:
    config = one.quantization or {"quant_method": one.config.get("format", "")}
    if quant_method_of(config) not in filter(None, formats()):
        return "0", "", f"all of it: {shortened(why_not_read(config), LONGEST_REASON)}", ""
    named = isinstance(error, NotWrittenError | LookupError)
    return "not tried", "", "", ("" if named else f"{type(error).__name__}: ") + first_line(error)


def _on_cpu(path: Path) -> tuple[str, str, str, str]:
    try:
        found = explained(path, platform=PLATFORM)
    except (ConfigError, ExplainError) as error:
        return "0", "", "", first_line(error)
    plain = _parts(found, quantized=False)
    refused = "; ".join(map(shortened, found.errors))
    return quantized(found), _listed(part.runs for part in plain), left(found), refused


def _on_gpu(path: Path, platform: str) -> str:
    try:
        found = explained(path, platform=platform)
    except (ConfigError, ExplainError):
        return ""
    return _listed(
        re.sub(r"vllm_native \((.*)\)", r"\1", part.runs) for part in _parts(found, quantized=True)
    )


def quantized(found: Explanation) -> str:
    """What runs the quantized layers, each with the number of layers or parts of layers."""
    return _listed(part.runs for part in _parts(found, quantized=True)) or "0"


def _parts(found: Explanation, *, quantized: bool) -> Iterator[PartPlan]:
    for layer in found.layers:
        for part in layer.likely.parts:
            if (part.descriptor.weight.element.kind != "dense") is quantized:
                yield part


def _listed(runs: Iterable[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(Counter(runs).items()))


def left(found: Explanation) -> str:
    reasons = Counter(
        entry.reason for entry in found.left if not any(t in entry.reason for t in TRIVIAL)
    )
    return "; ".join(f"{n}: {shortened(reason)}" for reason, n in sorted(reasons.items()))


def shortened(text: str, longest: int = LONGEST) -> str:
    text = re.sub(r"\S*/(\S+)", r"\1", " ".join(text.split()))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def first_line(error: Exception) -> str:
    return shortened(str(error).splitlines()[0] if str(error) else type(error).__name__)


def rows(chosen: Iterable[str]) -> Iterator[Row]:
    """Rows of the tables for the named files of tests/hub/published, each from a process of its
    own: vLLM changes classes of the transformers library for good."""
    server = get_context("forkserver")
    server.set_forkserver_preload(["tests.support.hub.preloaded"])
    with ProcessPoolExecutor(1, server, max_tasks_per_child=1) as pool:
        yield from pool.map(_row_of, chosen)


def _row_of(name: str) -> Row:
    print(name, file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory, torchvision_or_stand_in():
        return row(published()[name], Path(directory) / "checkpoint")


def page(found: Sequence[Row]) -> str:
    """The whole page: what stands before each table is kept."""
    text = PAGE.read_text()
    for at, head in enumerate((CPU_HEAD, GPU_HEAD)):
        before, old, after = _around(text, head)
        table = [*old[:2], *(one.lines[at] for one in found if len(one.lines) > at)]
        text = "\n".join([before, *table, after])
    return text


def table_of(text: str, head: Sequence[str]) -> list[list[str]]:
    """The cells of each row of the table with this head in ``text``."""
    lines = _around(text, head)[1][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def _around(text: str, head: Sequence[str]) -> tuple[str, list[str], str]:
    """Text before a table, the table's lines, and text after it."""
    lines = text.split("\n")
    first = lines.index(_line(*head))
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    return "\n".join(lines[:first]), lines[first:last], "\n".join(lines[last:])


if __name__ == "__main__":
    PAGE.write_text(page(list(rows(published()))))
