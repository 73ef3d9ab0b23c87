# SPDX-License-Identifier: Apache-2.0
"""What `explain` says of published checkpoints, as the table of docs/published-checkpoints.md.

    python -m tests.support.hub.table

writes it anew, in some minutes. Files of full size are written as headers; nothing is downloaded.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from tests.support.explained import explained
from tests.support.hub.checkpoints import published, write_headers
from tests.support.hub.selection import NotWrittenError, Published
from tests.support.no_torchvision import torchvision_or_stand_in
from tests.support.repository import ROOT
from vllm.compressed_linear.commands.explain.checkpoint import ExplainError
from vllm.compressed_linear.commands.explain.explanation import Explanation
from vllm.compressed_linear.formats.registry import format_of
from vllm.compressed_linear.formats.resolution import ConfigError

PAGE = ROOT / "docs" / "published-checkpoints.md"
PLATFORM = "cpu:zen4"
TRIVIAL = (
    "embedding tables are only looked up",
    "not quantize",
    "builds it without a quantization config",
    "the model reads its weight itself",
)
"""Reasons to leave to vLLM what is not quantized; if it were, it would be refused."""
LONGEST = 160


def row(one: Published, path: Path) -> list[str]:
    """Checkpoint, method, and what `explain` says of it on a CPU."""
    method = str(one.quantization.get("quant_method") or "–")
    return [one.name, one.architecture, method, *verdict(one, path)]


def verdict(one: Published, path: Path) -> list[str]:
    """[layers that this package runs, what is left to vLLM and why, what is refused and why]."""
    try:
        write_headers(one, path)
    except NotWrittenError as error:
        config = one.quantization
        if config and format_of(config) is None:
            return ["0", "all of it", f"{error}"]
        return ["not tried", "", str(error)]
    except Exception as error:  # the library has no such class, or cannot build it
        return ["not tried", "", f"{type(error).__name__}: {first_line(error)}"]
    try:
        found = explained(path, platform=PLATFORM)
    except (ConfigError, ExplainError) as error:
        return ["0", "", first_line(error)]
    return [ours(found), left(found), "; ".join(map(shortened, found.errors))]


def ours(found: Explanation) -> str:
    runs = Counter(part.runs or "nothing" for layer in found.layers for part in layer.likely.parts)
    quantized = [layer for layer in found.layers if not layer.unquantized]
    if not quantized:
        return "0"
    return f"{len(quantized)} layers: " + ", ".join(f"{n} {r}" for r, n in sorted(runs.items()))


def left(found: Explanation) -> str:
    reasons = Counter(
        entry.reason for entry in found.left if not any(t in entry.reason for t in TRIVIAL)
    )
    return "; ".join(f"{n}: {shortened(reason)}" for reason, n in sorted(reasons.items()))


def shortened(text: str) -> str:
    text = re.sub(r"\S*/(\S+)", r"\1", " ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def first_line(error: Exception) -> str:
    return shortened(str(error).splitlines()[0] if str(error) else type(error).__name__)


def rows(chosen: Iterable[str]) -> Iterator[list[str]]:
    """Rows of the table for the named files of tests/hub/published, each from a process of its own:
    vLLM changes classes of the transformers library for good."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        yield from pool.map(_row_of, chosen)


def _row_of(name: str) -> list[str]:
    print(name, file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory, torchvision_or_stand_in():
        return row(published()[name], Path(directory) / "checkpoint")


def page(found: list[list[str]]) -> str:
    """The whole page."""
    head = ["checkpoint", "architecture", "method", "runs here", "left to vLLM", "refused"]
    table = [head, ["---"] * len(head), *found]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in table]
    return "\n".join([PAGE.read_text().partition("\n| checkpoint ")[0].rstrip(), "", *lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(list(rows(published()))))
