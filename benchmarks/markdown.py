# SPDX-License-Identifier: Apache-2.0
"""Results of single layers as Markdown; ``docs/generate.py`` puts them into its pages."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import X_ROUNDED
from benchmarks.families import title_of, unmeasured
from benchmarks.table import (
    kernel_of,
    name_of,
    number,
    ours_of,
    product_limit,
    reading_cells,
    row,
    share_of_limit,
)

Report = dict[str, Any]


def reports(directory: Path, *, threads: int | None = None, forced: bool = False) -> list[Report]:
    """The records of ``benchmarks.linear`` in ``directory``, in the order of their kinds: with the
    kernels that are chosen there or, ``forced``, with an instruction set that was asked for; only
    those with so many ``threads``, if given."""
    found = [json.loads(file.read_text()) for file in directory.glob("*.json")]
    wanted = [
        report
        for report in found
        if (report["forced_isa"] is not None) == forced
        and (threads is None or report["threads"] == threads)
    ]
    return sorted(wanted, key=lambda r: (r["order"], r["threads"], r["machine"]["isa"]))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int) -> str:
    """A Markdown table; the last ``right`` columns hold numbers."""
    rules = ["---"] * (len(head) - right) + ["---:"] * right
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rules, *rows))


def caption(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _joined(*notes: str) -> str:
    # A narrow cell is broken before the parenthesis.
    return ",\N{NO-BREAK SPACE}".join(notes)


def _cell(report: Report, result: Report, base: Report | None, m: int) -> str:
    found = row(result, m)
    if found is None:
        return ""
    notes = []
    stock = None if base is None or base is result else row(base, m)
    if stock is not None:
        notes.append(f"×{stock['median_ms'] / found['median_ms']:.1f}")
    share = share_of_limit(report, result, m)
    if m > 1 and share is not None and result["id"].startswith("ours/"):
        notes.append(f"{share:.0%}")
    return f"{found['median_ms']:.2f}" + (f" ({_joined(*notes)})" if notes else "")


def _stock(report: Report) -> Report | None:
    return next((result for result in report["results"] if result["id"] == "vllm"), None)


def _rows(records: Sequence[Report]) -> list[int]:
    return sorted({r["m"] for report in records for x in report["results"] for r in x["rows"]})


def _size(result: Report) -> str:
    return f"{result['weight_bytes'] / 1e6:.1f}" + "*" * result.get("may_be_cached", False)


def _about(records: Sequence[Report]) -> str:
    first = records[0]
    about = first["machine"]
    dates = sorted({report["machine"]["date"] for report in records})
    loads = [r["machine"][f"load_average_{w}"] for r in records for w in ("before", "after")]
    commits = ", ".join(sorted({str(report["machine"]["revision"]) for report in records}))
    read = [report["limits"]["read_gb_per_s"] for report in records]
    said = (
        f"N={first['n']}, K={first['k']}, {_threads(first)} of {about['cpu']} "
        f"({title_of(about['family'])}), torch {about['torch']}, vLLM {about['vllm']}, commit "
        f"{commits}, {_range(dates)}, load average {_span(loads)}. Limits measured with each kind: "
        f"reading memory {_span(read)} GB/s; multiplying, 10⁹ operations a second: "
        f"{_products(records)}."
    )
    if any(result.get("may_be_cached") for report in records for result in report["results"]):
        said += " *: some of these weights may lie in the cache."
    return said


def _threads(report: Report) -> str:
    return f"{report['threads']} thread" + "s" * (report["threads"] > 1)


def _products(records: Sequence[Report]) -> str:
    """The best product of each arithmetic, over all records."""
    found: dict[str, list[tuple[float, str]]] = {}
    for report in records:
        best: dict[str, tuple[float, str]] = {}
        for product in report["limits"]["products"]:
            this = (product["gop_per_s"], product["name"])
            best[product["arithmetic"]] = max(this, best.get(product["arithmetic"], this))
        for arithmetic, this in best.items():
            found.setdefault(arithmetic, []).append(this)
    return ", ".join(
        f"{arithmetic} {max(each)[1]} {_span([rate for rate, _ in each])}"
        for arithmetic, each in found.items()
    )


def _span(values: Sequence[float]) -> str:
    return _range([f"{min(values):.0f}", f"{max(values):.0f}"])


def _range(ends: Sequence[str]) -> str:
    return ends[0] if ends[0] == ends[-1] else f"{ends[0]} to {ends[-1]}"


def _by_threads(records: Sequence[Report], part: Callable[[list[Report]], str]) -> str:
    """``part`` of the records of each number of threads."""
    counts = sorted({report["threads"] for report in records})
    return "\n\n".join(part([r for r in records if r["threads"] == count]) for count in counts)


def limits(directory: Path, scheme: str = "w4") -> str:
    """What the machine allows, as it was measured with one kind of weight, for each number of
    threads."""
    records = [r for r in reports(directory) if r["scheme"] == scheme]
    cells: dict[str, dict[int, str]] = {}
    for report in records:
        found, threads = report["limits"], report["threads"]
        for streams, rate in found["read_gb_per_s_by_streams"].items():
            name = f"reading, {streams} stream{'s' * (streams != '1')} a thread (GB/s)"
            cells.setdefault(name, {})[threads] = f"{rate:.1f}"
        for product in found["products"]:
            name = f"{product['arithmetic']}, {product['name']} (10⁹ operations/s)"
            cells.setdefault(name, {})[threads] = f"{product['gop_per_s']:.0f}"
    counts = [report["threads"] for report in records]
    rows = [[name, *(of.get(count, "") for count in counts)] for name, of in cells.items()]
    head = ["limit", *(_threads(report) for report in records)]
    about = records[0]["machine"]
    said = f"{about['cpu']}, {about['date']}, measured with {records[0]['title']}."
    return f"{table(head, rows, len(counts))}\n\n{caption(said)}"


def kinds(directory: Path) -> str:
    """Our kernel for each kind of weight, with one thread and with all."""
    return _by_threads(reports(directory), _kinds)


def _kinds(records: list[Report]) -> str:
    ms = _rows(records)
    rows = []
    for report in records:
        if not (found := ours_of(report)):
            rows.append([report["title"], "no kernel yet", *[""] * (len(ms) + 1)])
            continue
        cells = [_cell(report, found[0], _stock(report), m) for m in ms]
        kernel = kernel_of(found[0])
        rows.append([report["title"], kernel, _size(found[0]), *cells])
    text = caption(
        "Milliseconds per call, median. ×: speed relative to vLLM, if vLLM has a CPU kernel that "
        "keeps the contract. %, from 64 tokens on: share of the best product of the machine. "
        f"{_about(records)}"
    )
    head = ["weights", "kernel", "MB", *(f"M={m}" for m in ms)]
    return f"{table(head, rows, len(head) - 2)}\n\n{text}"


def one_token(directory: Path) -> str:
    """What one token costs with our kernels: the call, and reading or decoding the weights."""
    return _by_threads(reports(directory), _one_token)


def _one_token(records: list[Report]) -> str:
    rows = []
    for report in records:
        for result in ours_of(report):
            found = row(result, 1)
            assert found is not None
            rows.append(
                [
                    f"{report['title']}, {result['id'].removeprefix('ours/')}",
                    kernel_of({**result, "rows": [found]}),
                    f"{found['median_ms']:.2f}",
                    *reading_cells(report, result),
                ]
            )
    head = ["weights, backend", "kernel", "ms", "fixed (µs)", "GB/s", "without fixed (GB/s)"]
    head += ["decoded from the cache (GB/s)", "of reading", "of min(read, decode)"]
    text = caption(
        "One token. Fixed: the same op with 16 output channels, in the same rotation, with cold "
        f"caches; without fixed: the other bytes in the other time. {_about(records)}"
    )
    return f"{table(head, rows, 7)}\n\n{text}"


def older(directory: Path) -> str:
    """Our kernels of an instruction set that was asked for, for one token, next to the ones that
    are chosen."""
    rows = []
    records = reports(directory, forced=True)
    kinds = {report["scheme"]: report for report in reports(directory, threads=1)}
    for report in records:
        result = ours_of(report)[0]
        found, other = row(result, 1), row(ours_of(kinds[report["scheme"]])[0], 1)
        assert found is not None
        assert other is not None
        cached = report["limits"]["cached_gb_per_s"].get(result["id"].removeprefix("ours/"))
        rows.append(
            [
                report["title"],
                report["machine"]["isa"],
                f"{found['median_ms']:.2f}",
                f"{found['weight_gb_per_s']:.1f}",
                number(cached, 1),
                f"{share_of_limit(report, result, 1):.0%}",
                f"{found['median_ms'] / other['median_ms']:.2f}",
            ]
        )
    best_isa = next(iter(kinds.values()))["machine"]["isa"]
    head = ["weights", "path", "ms", "GB/s", "decoded from the cache (GB/s)"]
    head += ["of min(read, decode)", f"time relative to {best_isa}"]
    return f"{table(head, rows, 5)}\n\n{caption('One token. ' + _about(records))}"


def contenders(file: Path) -> str:
    """Everything that computes one kind of weight."""
    report = json.loads(file.read_text())
    ms = _rows([report])
    rows = [
        [
            name_of(result),
            _size(result),
            *(_cell(report, result, _stock(report), m) for m in ms),
        ]
        for result in report["results"]
    ]
    head = [report["title"], "MB", *(f"M={m}" for m in ms)]
    text = caption(
        "Milliseconds per call, median. ×: speed relative to vLLM with the x of the checkpoint. %: "
        f"share of the best product, {product_limit(report)[0]}. " + _about([report])
    )
    return f"{table(head, rows, len(head) - 1)}\n\n{text}"


def gains(before: Path, now: Path) -> str:
    """Our kernels of an older commit, as chosen and forced, next to those of ``now``."""
    old = [*reports(before, threads=1), *reports(before, threads=1, forced=True)]
    new = {report["scheme"]: report for report in reports(now, threads=1)}
    ms = _rows(old)
    rows = []
    for scheme in dict.fromkeys(report["scheme"] for report in old):
        shown = [(report, "") for report in old if report["scheme"] == scheme]
        shown += [(new[scheme], "now: ")] if scheme in new else []
        for report, when in shown:
            forced = f", {report['forced_isa']} forced" if report["forced_isa"] else ""
            for result in ours_of(report)[: 1 if forced else None]:
                name = f"{when}{name_of(result)}{forced}"
                cells = [_cell(report, result, _stock(report), m) for m in ms]
                rows.append([report["title"], name, *cells])
    head = ["weights", "kernel", *(f"M={m}" for m in ms)]
    text = caption(
        "Milliseconds per call, median. ×: speed relative to vLLM in the same run. Before: "
        f"{_about(old)}"
    )
    return f"{table(head, rows, len(ms))}\n\n{text}"


def never_slower(file: Path) -> str:
    """Our time as a share of vLLM's for every kind of layer."""
    report = json.loads(file.read_text())
    rows = []
    for layer in report["layers"]:
        cells = []
        for one in layer["cells"]:
            text = f"{one['ratio']:.2f}" + "?" * (not one["decided"])
            cells.append(f"**{text}**" if one["slower"] else text)
        title = layer["title"]
        if layer["contract"] == X_ROUNDED:
            title += f"; {X_ROUNDED}"
        kernels = dict.fromkeys(one["kernel"] or "no kernel of ours" for one in layer["cells"])
        size = f"{layer['n']}×{layer['k']}" + "*" * layer["may_be_cached"]
        ours = f"{layer['ours'].removeprefix('ours, ')} ({', '.join(kernels)})"
        rows.append([title, size, ours, layer["stock"].rpartition(", ")[2], *cells])
    about = report["machine"]
    counts = []
    for rounded, what in ((False, ""), (True, f" where vLLM's default has {X_ROUNDED}")):
        layers = [x for x in report["layers"] if (x["contract"] == X_ROUNDED) == rounded]
        if every := [one for layer in layers for one in layer["cells"]]:
            counts.append(f"{sum(one['slower'] for one in every)} of {len(every)}{what}")
    text = caption(
        f"Our median time as a share of vLLM's under the same contract; bold where it is more than "
        f"{report['slower_from'] - 1:.0%} longer: {', and '.join(counts)}. ?: the intervals leave "
        f"it open; *: weights may lie in the cache. {_threads(report)} of {about['cpu']} "
        f"({title_of(about['family'])}), vLLM {about['vllm']}, commit {about['revision']}, "
        f"{about['date']}, load average {about['load_average_before']:.0f} to "
        f"{about['load_average_after']:.0f}."
    )
    head = ["weights", "N×K", "ours (kernel)", "vLLM", *(f"M={m}" for m in report["m"])]
    return f"{table(head, rows, len(report['m']))}\n\n{text}"


def families(results: Path) -> str:
    """The families of processors that were measured, and those that were not."""
    found: dict[str, list[Report]] = {}
    for file in sorted(results.glob("*/*/*.json")):
        if file.parent.name in ("linear", "before"):
            found.setdefault(file.parent.parent.name, []).append(json.loads(file.read_text()))
    lines = []
    for name, records in found.items():
        cpus = ", ".join(sorted({report["machine"]["cpu"] for report in records}))
        dates = _range(sorted({report["machine"]["date"] for report in records}))
        lines.append(f"* **{title_of(name)}**: measured, {cpus}, {dates}")
    lines += [f"* {family.title}: not measured" for family in unmeasured(found)]
    return "\n".join(lines)
