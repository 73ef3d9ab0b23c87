# SPDX-License-Identifier: Apache-2.0
"""Rewrite the parts of the documentation that are generated from the code.

    python docs/generate.py

Such a part is enclosed by ``<!-- generated: NAME ARGUMENT... -->`` and ``<!-- end -->`` in
README.md or a page of ``docs/``; NAME is a key of ``PARTS``. The files of ``IMAGES`` are written as
a whole. ``tests/docs/test_documentation.py`` fails when a page and the code disagree.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path("tests") / "fixtures"
RESULTS = ROOT / "benchmarks" / "results"
PART = re.compile(r"(<!-- generated: (?P<call>.+?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
WIDTH = "96"


def pages() -> list[Path]:
    """README.md and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str, only: Callable[[str], bool] = lambda name: True) -> str:
    """Return a page's ``text`` with those generated parts renewed that ``only`` accepts."""

    def replace(match: re.Match[str]) -> str:
        name, *arguments = shlex.split(match["call"])
        if not only(name):
            return match[0]
        return f"{match[1]}{PARTS[name](*arguments).strip()}\n{match[4]}"

    return PART.sub(replace, text)


def comparable(text: str) -> str:
    """Return ``text`` without figures that differ from run to run."""
    return re.sub(r'("prepare_seconds"|"pid"): [\d.e-]+', r"\1: …", text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """A Markdown table; the last ``right`` columns hold numbers."""
    rules = ["---"] * (len(head) - right) + ["---:"] * right
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rules, *rows))


@contextmanager
def importing_from(directory: Path) -> Iterator[None]:
    """Put ``directory`` first on ``sys.path``."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.pop(0)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set these environment variables and no other settings of this package."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("VLLM_COMPRESSED_LINEAR"):
            del os.environ[name]
    # Ignore the developer's tune file.
    os.environ.update({"VLLM_COMPRESSED_LINEAR_TUNE_FILE": "off"} | variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def command(*arguments: str) -> str:
    """The command line ``vllm-compressed-linear ARGUMENTS`` and what it writes."""
    # vLLM's log handler keeps the stdout of its first import, which must not be the captured one.
    import vllm.logger  # noqa: F401
    from typer.testing import CliRunner

    from vllm.compressed_linear.commands.cli import app

    here = Path.cwd()
    os.chdir(ROOT)
    try:
        with environment(COLUMNS=WIDTH):
            found = CliRunner().invoke(app, list(arguments))
    finally:
        os.chdir(here)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    lines = [line.rstrip() for line in found.output.splitlines() if not _is_vllms(line)]
    text = "\n".join(lines).strip("\n")
    return f"```console\n$ vllm-compressed-linear {shlex.join(arguments)}\n{text}\n```"


def _is_vllms(line: str) -> bool:
    """vLLM's note on machines without a GPU."""
    return line.startswith("Triton is installed")


def settings_table() -> str:
    """The table of ``settings.py``."""
    from vllm.compressed_linear import settings

    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (settings.__doc__ or "").splitlines()
        if line.startswith("|")
    ]
    code = [[_code(row[0]), _code(row[1]), row[2].replace("``", "`")] for row in rows[2:]]
    return table(rows[0], code)


def _code(text: str) -> str:
    return text if text == "–" else f"`{text.strip(chr(34))}`"


def own_backends() -> dict[str, Any]:
    """The backends of this package by name, in the order of their entry points."""
    from vllm.compressed_linear.backends import registry

    package = "vllm.compressed_linear.backends."
    return {
        name: found
        for name, found in registry.backends().items()
        if found.backend.__module__.startswith(package)
    }


def capability_matrix() -> str:
    """What each backend declares, one row for each axis."""
    found = own_backends()
    rows: list[list[str]] = []

    def row(what: str, cell: Callable[[Any], str]) -> None:
        rows.append([what, *(cell(entry.backend) for entry in found.values())])

    def names(values: Any) -> str:
        return ", ".join(str(v) for v in sorted(values)) or "–"

    def yes(value: bool) -> str:
        return "yes" if value else "–"

    row("devices", lambda b: names(b.capabilities.devices))
    row("integer codes, bits", lambda b: _ranges(b.capabilities.integer_bits))
    row("other elements", lambda b: names(b.capabilities.other_elements))
    row("codebooks of scalars", lambda b: yes(b.capabilities.codebooks))
    row("scales per", lambda b: names(b.capabilities.granularities))
    row("dtypes of scales", lambda b: names(b.capabilities.scale_dtypes))
    row("zero points", lambda b: names(b.capabilities.zero_kinds))
    row("dtypes of activations", lambda b: names(b.capabilities.input_dtypes))
    row("channel order", lambda b: yes(b.capabilities.channel_order))
    row("channel order with padded groups", lambda b: yes(b.capabilities.padded_order))
    row("second-level scales", lambda b: yes(b.capabilities.row_scale))
    row("quantized activations", lambda b: yes(b.capabilities.activations))
    row("per-channel scale of activations", lambda b: yes(b.capabilities.prescale))
    row("transforms", lambda b: yes(b.capabilities.transforms))
    row("lookup of rows (embedding tables)", lambda b: yes(b.capabilities.lookup))
    row("needs", lambda b: names(b.capabilities.required_ops))
    row("weights rounded before multiplying", lambda b: _rounding(b))
    row("batch invariant", lambda b: _invariance(b))
    return table(["", *(f"`{name}`" for name in found)], rows)


def _invariance(backend: Any) -> str:
    if backend.batch_invariant:
        return "yes"
    # Bound to each class, so that the functions behind them are compared.
    from vllm.compressed_linear.backends.base import QuantLinearMethod

    own, inherited = backend.rows_are_independent, QuantLinearMethod.rows_are_independent
    return "–" if own.__func__ is inherited.__func__ else "with one path for every M"


def _rounding(backend: Any) -> str:
    from vllm.compressed_linear.spec.elements import uint
    from vllm.compressed_linear.testing import Case

    value = backend.contract(Case(uint(4, 8)).build().descriptor).weight_rounding
    return "–" if value == 0 else "to 16 bits"


def _ranges(numbers: Any) -> str:
    found = sorted(numbers)
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]}–{found[-1]}"
    return ", ".join(map(str, found)) or "–"


def coverage(summary: str = "") -> str:
    """Which fixtures vLLM alone and this package load; with ``count`` only how many."""
    names = tuple(sorted(path.name for path in (ROOT / FIXTURES).iterdir() if path.is_dir()))
    stock = _stock(names)
    ours = {name: _runs_on(name) for name in names}
    if summary == "count":
        loads = sum(not reason for reason in stock.values())
        return (
            f"vLLM alone loads {loads} of the {len(names)}. With this package all "
            f"{sum(bool(found) for found in ours.values())} load."
        )
    rows = [[f"`{name}`", stock[name] or "loads", ours[name]] for name in names]
    return table(["checkpoint", "vLLM 0.32 alone", "with this package, runs on"], rows)


@cache
def _stock(names: tuple[str, ...]) -> dict[str, str]:
    """Why vLLM alone, on this machine's CPU, does not load a fixture; empty if it does."""
    import torch

    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "logits.pt"
        paths = [str(ROOT / FIXTURES / name) for name in names]
        worker = "tests.support.stock_worker"
        with environment(VLLM_COMPRESSED_LINEAR="0"):
            subprocess.run(
                [sys.executable, "-m", worker, str(out), "bfloat16", *paths],
                cwd=ROOT,
                check=True,
                capture_output=True,
                timeout=300,
            )
        found: dict[str, torch.Tensor | str] = torch.load(out)
    return {name: _short(v) if isinstance(v, str) else "" for name, v in found.items()}


def _short(error: str) -> str:
    """The first sentence of an error of vLLM's, as code."""
    text = re.sub(r"^\w+: (\d+ validation error for \w+\s+Value error, )?", "", error.strip())
    text = re.split(r"\. | \[type=|Reasons:|, but | for \[|, currently ", text.split("\n")[0])[0]
    return f"`{text.strip().rstrip('.')}`"


def _runs_on(name: str) -> str:
    from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
    from vllm.compressed_linear.prepare.plan import DELEGATED

    _load(ROOT / FIXTURES / name)
    found = sorted({entry.backend for entry in PROCESS_PLAN.entries.values()})
    return ", ".join("vLLM’s own code" if b == DELEGATED else f"`{b}`" for b in found)


def _load(path: Path, **variables: str) -> None:
    """Load a checkpoint into vLLM's model class in this process; the plan is that of the load."""
    with importing_from(ROOT):
        from tests.support.model_loading import loaded
    with environment(**variables), loaded(path, "bfloat16"):
        pass


def benchmark(kind: str, *where: str) -> str:
    """Results in ``benchmarks/results`` as ``benchmarks/markdown.py`` and ``markdown_models.py``
    show them: ``families`` of all; else of the family named first, and for some a file's name."""
    with importing_from(ROOT):
        from benchmarks import markdown, markdown_models
    if kind == "families":
        return markdown.families(RESULTS)
    family, name = RESULTS / where[0], where[1] if len(where) > 1 else ""
    return {
        "limits": lambda: markdown.limits(family / "linear"),
        "kinds": lambda: markdown.kinds(family / "linear"),
        "one-token": lambda: markdown.one_token(family / "linear"),
        "older": lambda: markdown.older(family / "linear"),
        "contenders": lambda: markdown.contenders(family / "linear" / f"{name}.json"),
        "gains": lambda: markdown.gains(family / "before", family / "linear"),
        "never-slower": lambda: markdown.never_slower(family / "never-slower.json"),
        "serving": lambda: markdown_models.serving(family / "serve" / f"{name}.json"),
        "schemes": lambda: markdown_models.schemes(family / "serve" / f"{name}.json"),
        "preparation": lambda: markdown_models.preparation(family / f"{name}.json"),
        "step": lambda: markdown_models.step(family / "step" / f"{name}.json"),
    }[kind]()


def message(name: str) -> str:
    """An error, provoked by ``messages.py``; continued lines are indented."""
    with importing_from(ROOT / "docs"):
        import messages
    with environment():
        lines = messages.message(name).splitlines()
    wrapped = [
        textwrap.fill(
            line,
            int(WIDTH),
            subsequent_indent=" " * (len(line) - len(line.lstrip()) + 4),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines
    ]
    return "```text\n" + "\n".join(wrapped) + "\n```"


def plan_file(name: str) -> str:
    """The beginning of a plan file: everything but the layers, and the first of these."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plan.json"
        _load(ROOT / FIXTURES / name, VLLM_COMPRESSED_LINEAR_PLAN_FILE=str(file))
        lines = file.read_text().splitlines()
    end = lines.index("  },")
    return "```json\n" + "\n".join(lines[: end + 1]) + "\n```"


def source(file: str) -> str:
    """A file of the repository, without its licence line."""
    text = (ROOT / file).read_text().removeprefix("# SPDX-License-Identifier: Apache-2.0\n")
    return f"```{'toml' if file.endswith('.toml') else 'py'}\n{text.strip()}\n```"


def gpu_order() -> str:
    """Which backends run a weight on each GPU, the first first."""
    with importing_from(ROOT / "docs"):
        import gpu_order
    with environment():
        return table(["Weights", "Compute capability", "Order"], gpu_order.rows())


def folders() -> str:
    """The diagram of the folders, which is a file of ``IMAGES``."""
    return "![Folders of the package and the imports between them](images/folders.svg)"


def folders_image() -> str:
    """The contents of ``images/folders.svg``."""
    with importing_from(ROOT / "docs"):
        import folders
    return folders.svg(ROOT)


PARTS: dict[str, Callable[..., str]] = {
    "benchmark": benchmark,
    "capabilities": capability_matrix,
    "command": command,
    "coverage": coverage,
    "folders": folders,
    "gpu-order": gpu_order,
    "message": message,
    "plan-file": plan_file,
    "settings": settings_table,
    "source": source,
}
IMAGES: dict[str, Callable[[], str]] = {"docs/images/folders.svg": folders_image}
"""Generated files by their path in the repository."""


def main() -> None:
    for page in pages():
        before = page.read_text()
        after = render(before)
        if comparable(after) != comparable(before):
            page.write_text(after)
            print(f"rewritten: {page.relative_to(ROOT)}")
    for name, image in IMAGES.items():
        if (content := image()) != ((ROOT / name).read_text() if (ROOT / name).exists() else ""):
            (ROOT / name).write_text(content)
            print(f"rewritten: {name}")


if __name__ == "__main__":
    main()
