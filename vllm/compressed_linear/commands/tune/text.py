# SPDX-License-Identifier: Apache-2.0
"""Progress and results of ``tune`` as text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from vllm.compressed_linear.backends.measurements import Measured
from vllm.compressed_linear.commands.explain.text import in_words
from vllm.compressed_linear.commands.text import compress_names
from vllm.compressed_linear.commands.tune.tune import LayerResult, Progress, TuneResult
from vllm.compressed_linear.machine.limits import MachineLimits

SHOWN = (1, 4, 16, 64, 512, 2048)
"""M of the table's columns, if measured; the file has all of them."""


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on stderr, removed at the end."""
    with tqdm(bar_format="{desc} {bar} {n_fmt}/{total_fmt} {elapsed}", leave=False) as bar:

        def show(text: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(text, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        yield show


def print_result(result: TuneResult, console: Console) -> None:
    """Write the machine's limits, and a table for each descriptor."""
    key = result.key
    about = key.cpu
    if key.threads:  # of a GPU there are none
        threads = f"{key.threads} thread" + ("s" if key.threads > 1 else "")
        about = f"{key.cpu} ({key.isa or 'without our library'}), {threads}"
    console.print(Text(about, style="bold"))
    if result.measurements.limits is not None:
        console.print(Text(_limits(result.measurements.limits)))
    for layer in result.layers:
        _print_layer(layer, console)
    for failure in result.failures:
        console.print(Text(f"Error: {failure}", style="bold red"))


def _print_layer(layer: LayerResult, console: Console) -> None:
    console.print()
    console.print(Text(_names(layer.layers), style="bold"))
    console.print(Text(in_words(layer.descriptor)))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("ms a call", min_width=34, overflow="fold")
    sizes = [m for m in SHOWN if all(m in found.seconds for found in layer.measured.values())]
    for m in sizes:
        table.add_column(f"M={m}", justify="right", no_wrap=True, min_width=6)
    table.add_column("expected", justify="right", no_wrap=True)
    for candidate in layer.candidates:
        measured = layer.measured.get(candidate.name)
        if measured is None:
            continue
        runs = f"{candidate.name} ({measured.variant})" if measured.variant else candidate.name
        table.add_row(
            Text(runs, style="green" if candidate.name == layer.chosen else ""),
            *(_cell(measured, m) for m in sizes),
            _milliseconds(measured.expected),
        )
    console.print(table)
    if layer.chosen != layer.estimate:
        console.print(Text(f"the cost model would choose {layer.estimate}", style="yellow"))


def _names(names: tuple[str, ...]) -> str:
    """Compress the names of layers that differ only by index."""
    by_words: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        words = tuple("#" if word.isdigit() else word for word in name.split("."))
        by_words.setdefault(words, []).append(name)
    return ", ".join(compress_names(same) for same in by_words.values())


def _cell(measured: Measured, m: int) -> Text:
    """The median, and its interval if that exceeds ± 5 %."""
    text = Text(_milliseconds(measured.seconds[m]))
    if measured.spread[m] > 0.05:
        text.append(f" ±{measured.spread[m]:.0%}", style="dim")
    return text


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:#.3g}".rstrip(".")


def _limits(limits: MachineLimits) -> str:
    return (
        f"reads {limits.read / 1e9:.1f} GB/s, multiplies {limits.fp32 / 1e9:.0f} GFLOP/s in fp32, "
        f"{limits.bf16 / 1e9:.0f} in bf16, {limits.int8 / 1e9:.0f} GOP/s in int8"
    )
