# SPDX-License-Identifier: Apache-2.0
"""Is any layer slower with this package than vLLM alone runs it? Over all kinds of weights.

Ours is the backend that a load would choose here, with the user's settings and tune file. It is
timed in turns with vLLM's own layer under the same contract: 4-bit layers of vLLM keep x
(``VLLM_CPU_INT4_W4A8=0``). Where vLLM by default rounds that x to 8 bits, this is timed next to
``cpu_int8_fast``, which the user has to ask for. A cell is slower when the median is more than 3 %
longer; cells whose intervals do not decide it are measured longer.

    python -m benchmarks.never_slower                   every kind that vLLM has a kernel for
    python -m benchmarks.never_slower w4 bf16 --m 1 64 --size 640x2048
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import contest, machine, ours
from benchmarks.contender import Contender
from benchmarks.contest import EXACT, LOOSE, X_ROUNDED
from benchmarks.remote import STOCK, STOCK_DEFAULT, CannotRunError, RemoteContender, Vllm
from benchmarks.schemes import ZOO, Scheme
from benchmarks.timing import Elapsed, allow_tiles, in_turns
from vllm.compressed_linear.machine.timing import Timing
from vllm.compressed_linear.testing import Problem

ROWS = (1, 4, 16, 64, 256)
SIZES = ("4096x4096", "1024x640")
"""N×K: a layer of a large model, and one so small that what a call costs shows."""
SLOWER = 1.03
"""From this ratio of medians on, ours counts as slower."""
LONGEST = 4
"""Undecided cells are measured up to this many times as long."""
ROUNDS = 7
FAST = "cpu_int8_fast"


@dataclass(frozen=True)
class Pair:
    """Ours and vLLM's, which compute the same."""

    ours: Contender
    stock: RemoteContender


def same_contract(scheme: Scheme, problem: Problem, vllm: Vllm) -> Pair:
    """What a load would choose, and vLLM's layer; ``CannotRunError`` where vLLM has none."""
    tolerance = EXACT if problem.descriptor.activation is None else LOOSE
    stock = RemoteContender(vllm, scheme.stock, problem, tolerance)
    return Pair(ours.chosen(problem), stock)


def rounded(scheme: Scheme, problem: Problem, vllm: Vllm) -> Pair | None:
    """``cpu_int8_fast`` and vLLM's layer by default, if that rounds x to 8 bits unasked."""
    if scheme.stock != "wna16" or FAST not in ours.able(problem)[0]:
        return None
    try:
        stock = RemoteContender(vllm, scheme.stock, problem, LOOSE)
    except CannotRunError:
        return None
    if contest.contract_of(stock, problem) != X_ROUNDED:
        return None
    return Pair(ours.contender(problem, FAST), stock)


def undecided(mine: Timing, theirs: Timing) -> bool:
    """Whether the intervals leave open if ours is slower."""
    return mine.low <= SLOWER * theirs.high and mine.high >= SLOWER * theirs.low


def cell(pair: Pair, x: torch.Tensor, seconds: float) -> dict[str, Any]:
    """Times of both with ``x``, and their ratio."""
    taken: tuple[list[Elapsed], ...] = ([], [])
    for _ in range(LONGEST):
        for times, new in zip(
            taken, in_turns([pair.ours, pair.stock], x, seconds, ROUNDS), strict=True
        ):
            times += new
        mine, theirs = (Timing.of([t.counted for t in times]) for times in taken)
        if not undecided(mine, theirs):
            break
    ratio = mine.median / theirs.median
    return {
        "m": len(x),
        "kernel": ours.kernel_of(pair.ours, x),
        "ours_ms": mine.median * 1e3,
        "stock_ms": theirs.median * 1e3,
        "ours_spread": mine.spread,
        "stock_spread": theirs.spread,
        "calls": mine.calls,
        "ratio": ratio,
        "slower": ratio > SLOWER,
        "decided": not undecided(mine, theirs),
    }


def compare(pair: Pair, problem: Problem, rows: Sequence[int], seconds: float) -> dict[str, Any]:
    """Both, checked against the exact product, and a cell for each M."""
    records = contest.records({"ours": pair.ours, "stock": pair.stock}, problem)
    return {
        "ours": pair.ours.name,
        "stock": pair.stock.name,
        "contract": records[0]["contract"],
        "may_be_cached": any(record["may_be_cached"] for record in records),
        "cells": [cell(pair, problem.activations(m), seconds) for m in rows],
    }


def layers(
    names: Sequence[str], sizes: Sequence[tuple[int, int]], vllms: Mapping[str, Vllm]
) -> Iterator[tuple[dict[str, Any], Problem, Pair | str]]:
    """Every layer with what is compared, or with what vLLM said where it has no kernel."""
    for name in names:
        scheme = ZOO[name]
        if not scheme.stock:
            continue
        for n, k in sizes:
            problem = scheme.problem(n, k)
            about = {"scheme": name, "title": scheme.title, "n": n, "k": k}
            try:
                yield about, problem, same_contract(scheme, problem, vllms["vllm"])
            except CannotRunError as error:
                yield about, problem, str(error)
                break
            if (pair := rounded(scheme, problem, vllms["vllm-default"])) is not None:
                yield about, problem, pair


def table(report: Mapping[str, Any]) -> Table:
    """The record for people: ratios of our time to vLLM's."""
    found = Table(
        title=f"Our time as a share of vLLM's, {report['threads']} thread(s) of "
        f"{report['machine']['cpu']}",
        caption=f"slower: more than {SLOWER - 1:.0%} longer; ? not decided; * weights may lie in "
        "the cache",
        title_justify="left",
    )
    for title in ("weights", "N×K", "ours", "vLLM"):
        found.add_column(title)
    for m in report["m"]:
        found.add_column(f"M={m}", justify="right")
    for layer in report["layers"]:
        cells = []
        for one in layer["cells"]:
            text = f"{one['ratio']:.2f}" + "?" * (not one["decided"])
            cells.append(Text(text, "bold red" if one["slower"] else "green"))
        title = layer["title"] + (f"; {X_ROUNDED}" if layer["contract"] == X_ROUNDED else "")
        size = f"{layer['n']}×{layer['k']}" + "*" * layer["may_be_cached"]
        found.add_row(title, size, layer["ours"], layer["stock"], *cells)
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of all kinds that were asked for; written after each layer."""
    facts = machine.about()
    report: dict[str, Any] = {
        "threads": arguments.threads,
        "clock": "CPU" if arguments.threads == 1 else "wall",
        "slower_from": SLOWER,
        "m": arguments.m,
        "machine": facts,
        "layers": [],
        "no_kernel": {},
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), ExitStack() as stack:
        vllms = {"vllm": Vllm(STOCK), "vllm-default": Vllm(STOCK_DEFAULT)}
        for process in vllms.values():
            stack.callback(process.close)
        sizes = [(int(n), int(k)) for n, _, k in (size.partition("x") for size in arguments.size)]
        for about, problem, found in layers(arguments.schemes or list(ZOO), sizes, vllms):
            if isinstance(found, str):
                report["no_kernel"][about["scheme"]] = found
            else:
                layer = about | compare(found, problem, arguments.m, arguments.seconds)
                report["layers"].append(layer)
                ratios = ", ".join(f"{one['ratio']:.2f}" for one in layer["cells"])
                print(f"{about['title']} {about['n']}x{about['k']}: {ratios}", flush=True)
            report["machine"] = facts | {"load_average_after": os.getloadavg()[0]}
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schemes", nargs="*", metavar="KIND", help=", ".join(ZOO))
    parser.add_argument("--size", nargs="+", default=list(SIZES), help="NxK of the layers")
    parser.add_argument("--m", type=int, nargs="+", default=list(ROWS), help="rows of x")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each cell, at least")
    parser.add_argument("--json", type=Path, default=machine.BUILD / "never-slower.json")
    arguments = parser.parse_args()
    unknown = set(arguments.schemes) - set(ZOO)
    if unknown:
        parser.error(f"unknown kind {', '.join(sorted(unknown))} (known: {', '.join(ZOO)})")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    allow_tiles()
    started = time.perf_counter()
    report = run(arguments)
    cells = [one for layer in report["layers"] for one in layer["cells"]]
    slower = sum(one["slower"] for one in cells)
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table(report))
    console.print(
        f"{slower} of {len(cells)} cells slower; {len(report['no_kernel'])} kinds without a kernel "
        f"of vLLM's; load average {report['machine']['load_average_before']:.1f} to "
        f"{report['machine']['load_average_after']:.1f}; written to {arguments.json} in "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
