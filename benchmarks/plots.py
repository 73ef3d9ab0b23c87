# SPDX-License-Identifier: Apache-2.0
"""Draws what ``benchmarks.linear`` and ``benchmarks.serve`` have measured, as PNG files.

python -m benchmarks.plots [RESULTS [IMAGES]]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.machine import BUILD
from benchmarks.markdown import Report, reports
from benchmarks.table import decode_limit, ours_of, row

OURS, LIMIT, OTHERS = "#1f77b4", "#d62728", ("#7f7f7f", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")


def one_token(records: list[Report]) -> Figure:
    """Packed weights read for one token, GB/s, beside what the machine allows."""
    shown = [(r, ours_of(r)[0]) for r in records if ours_of(r) and row(ours_of(r)[0], 1)]
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(shown) + 1.4), layout="constrained")
    for at, (report, result) in enumerate(shown):
        found = row(result, 1)
        assert found is not None
        axes.barh(at, found["weight_gb_per_s"], color=OURS, height=0.7)
        limit = decode_limit(report, result)
        axes.plot([limit, limit], [at - 0.4, at + 0.4], color=LIMIT, linewidth=2)
    axes.set_yticks(range(len(shown)), [report["title"] for report, _ in shown])
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of packed weights, one token; red: limit of reading or decoding")
    return figure


def over_rows(report: Report) -> Figure:
    """Time of each contender over the number of tokens."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = iter(OTHERS * 3)
    for result in report["results"]:
        ours = result["id"].startswith("ours/")
        axes.plot(
            [found["m"] for found in result["rows"]],
            [found["median_ms"] for found in result["rows"]],
            marker="o",
            linewidth=2.5 if ours else 1.5,
            color=OURS if ours else next(colours),
            label=result["name"],
        )
    ms = [found["m"] for found in report["results"][0]["rows"]]
    limits = report["limits"]
    smallest = min(result["weight_bytes"] for result in report["results"])
    work = 2 * report["n"] * report["k"] / limits["bf16_gemm_gflop_per_s"] / 1e6
    read = smallest / limits["read_gb_per_s"] / 1e6
    axes.plot(ms, [max(read, m * work) for m in ms], "--", color=LIMIT, label="limit")
    axes.set(xscale="log", yscale="log", xlabel="tokens (M)", ylabel="ms", title=report["title"])
    axes.set_xticks(ms, [str(m) for m in ms])
    axes.minorticks_off()
    axes.legend()
    return figure


def decode(report: Report) -> Figure:
    """Tokens per second of the engines that served a model, for each number of streams."""
    engines = [e for e in report["engines"].values() if "error" not in e]
    streams = list(engines[0]["decode_tokens_per_s"])
    figure, panels = plt.subplots(
        1,
        len(streams),
        figsize=(11, 0.4 * len(engines) + 1.4),
        sharey=True,
        layout="constrained",
    )
    for axes, count in zip(panels, streams, strict=True):
        for at, engine in enumerate(engines):
            colour = OURS if "this package" in engine["name"] else OTHERS[0]
            rate = engine["decode_tokens_per_s"][count]
            bar = axes.barh(at, rate, color=colour)
            axes.bar_label(bar, fmt="%.0f", padding=2)
        axes.set_xlabel(f"tokens/s, {count} stream" + "s" * (count != "1"))
        axes.margins(x=0.2)
    panels[0].set_yticks(range(len(engines)), [engine["name"] for engine in engines])
    panels[0].invert_yaxis()
    figure.suptitle(report["title"])
    return figure


def figures(results: Path) -> Iterator[tuple[str, Figure]]:
    """Every plot that the records in ``results`` allow, with its name."""
    if records := reports(results / "linear"):
        yield "linear-one-token", one_token(records)
        for file in sorted((results / "linear").glob("*.json")):
            yield f"linear-{file.stem}", over_rows(json.loads(file.read_text()))
    for file in sorted((results / "serve").glob("*.json")):
        yield f"serve-{file.stem}", decode(json.loads(file.read_text()))


def draw(results: Path, images: Path) -> list[Path]:
    """Writes ``figures``; returns the files."""
    images.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures(results):
        written.append(images / f"{name}.png")
        figure.savefig(written[-1], dpi=100)
        plt.close(figure)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=BUILD)
    parser.add_argument("images", nargs="?", type=Path, default=BUILD / "plots")
    arguments = parser.parse_args()
    for file in draw(arguments.results, arguments.images):
        print(file)


if __name__ == "__main__":
    main()
