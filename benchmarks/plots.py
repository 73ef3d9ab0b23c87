# SPDX-License-Identifier: Apache-2.0
"""Draw the results of ``benchmarks.linear`` and ``benchmarks.serve`` as SVG files.

python -m benchmarks.plots [RESULTS [IMAGES]]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.families import title_of
from benchmarks.machine import BUILD
from benchmarks.markdown import Report, reports
from benchmarks.table import decode_limit, name_of, ours_of, product_limit, row

# The same records give the same bytes, so a diff shows only plots that changed.
mpl.rcParams["svg.hashsalt"] = "compressed_linear"
REPRODUCIBLE = {"Date": None, "Creator": None}


class Style(NamedTuple):
    """Colour, marker and dashes of a line; each of the three alone tells every line apart."""

    color: str
    marker: str
    linestyle: str | tuple[int, tuple[float, ...]]


# The palette of Okabe and Ito, "Color Universal Design" (2008), without its yellow, which is too
# light for a line on white, and with an indigo, an olive, a brown and a grey.
BLUE, SKY, INDIGO, GREEN, ORANGE, VERMILLION, PURPLE, BLACK, OLIVE, BROWN, GREY = (
    "#0072B2",
    "#56B4E9",
    "#332288",
    "#009E73",
    "#E69F00",
    "#D55E00",
    "#CC79A7",
    "#000000",
    "#999933",
    "#661100",
    "#8C8C8C",
)
OURS = (Style(BLUE, "o", "-"), Style(SKY, "s", (0, (8, 1))), Style(INDIGO, "D", (0, (8, 1, 1, 1))))
OTHERS = (
    Style(BLACK, "^", "--"),
    Style(ORANGE, "v", "-."),
    Style(VERMILLION, "P", (0, (1, 1))),
    Style(PURPLE, "X", (0, (5, 1, 1, 1, 1, 1))),
    Style(GREEN, "*", (0, (2, 2))),
    Style(OLIVE, "<", (0, (6, 3))),
    Style(BROWN, ">", (0, (3, 1, 3, 4))),
)
LIMIT = Style(GREY, "None", ":")


def one_token(records: list[Report]) -> Figure:
    """Packed weights read for one token in GB/s, and the machine's limit for each kind."""
    shown = [(r, ours_of(r)[0]) for r in records if ours_of(r) and row(ours_of(r)[0], 1)]
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(shown) + 1.8), layout="constrained")
    rates, limits = [], []
    for report, result in shown:
        found = row(result, 1)
        assert found is not None
        rates.append(found["weight_gb_per_s"])
        limits.append(decode_limit(report, result))
    places = range(len(shown))
    axes.barh(places, rates, color=BLUE, height=0.7, label="measured")
    marks = [place - 0.4 for place in places], [place + 0.4 for place in places]
    axes.vlines(limits, *marks, color=VERMILLION, linewidth=2.5, label="limit: reading or decoding")
    axes.set_yticks(places, [report["title"] for report, _ in shown])
    axes.margins(y=0.02)
    axes.invert_yaxis()
    family = title_of(records[0]["machine"]["family"])
    axes.set_xlabel(f"GB/s of packed weights, one token, one thread, {family}")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def _title(report: Report) -> str:
    threads = f"{report['threads']} thread" + "s" * (report["threads"] > 1)
    return f"{report['title']}, {title_of(report['machine']['family'])}, {threads}"


def over_rows(report: Report) -> Figure:
    """Time of each contender over the number of tokens."""
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    ours, others = cycle(OURS), cycle(OTHERS)
    for result in report["results"]:
        is_ours = result["id"].startswith("ours/")
        style = next(ours if is_ours else others)
        axes.plot(
            [found["m"] for found in result["rows"]],
            [found["median_ms"] for found in result["rows"]],
            linewidth=2.5 if is_ours else 1.5,
            markersize=7,
            label=name_of(result),
            **style._asdict(),
        )
    ms = [found["m"] for found in report["results"][0]["rows"]]
    product, rate = product_limit(report)
    smallest = min(result["weight_bytes"] for result in report["results"])
    work = 2 * report["n"] * report["k"] / rate / 1e6
    read = smallest / report["limits"]["read_gb_per_s"] / 1e6
    axes.plot(
        ms,
        [max(read, m * work) for m in ms],
        linewidth=2,
        label=f"limit: reading; {product}",
        **LIMIT._asdict(),
    )
    axes.set(xscale="log", yscale="log", xlabel="tokens (M)", ylabel="ms", title=_title(report))
    axes.set_xticks(ms, [str(m) for m in ms])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color=GREY, alpha=0.3)
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
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
            colour = BLUE if "this package" in engine["name"] else GREY
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
    """Every plot that the records in ``results``, those of one family, allow, with its name."""
    if records := reports(results / "linear", threads=1):
        yield "linear-one-token", one_token(records)
    for report in reports(results / "linear"):
        threads = f"-{report['threads']}-threads" if report["threads"] > 1 else ""
        yield f"linear-{report['scheme']}{threads}", over_rows(report)
    for file in sorted((results / "serve").glob("*.json")):
        yield f"serve-{file.stem}", decode(json.loads(file.read_text()))


def draw(results: Path, images: Path) -> list[Path]:
    """Writes ``figures``; returns the files."""
    images.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures(results):
        written.append(images / f"{name}.svg")
        figure.savefig(written[-1], metadata=REPRODUCIBLE)
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
