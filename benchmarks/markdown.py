# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown, for the documentation: ``docs/generate.py`` puts them into its pages."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import ours_of, row, share_of_limit

Report = dict[str, Any]


def reports(directory: Path) -> list[Report]:
    """Every record of ``benchmarks.linear`` in ``directory``, in the order of its kinds."""
    found = [json.loads(file.read_text()) for file in directory.glob("*.json")]
    return sorted(found, key=lambda report: (report["order"], report["machine"]["isa"]))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: int) -> str:
    """A Markdown table; the last ``right`` columns hold numbers."""
    rules = ["---"] * (len(head) - right) + ["---:"] * right
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rules, *rows))


def _caption(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _cell(report: Report, result: Report, base: Report | None, m: int) -> str:
    found = row(result, m)
    if found is None:
        return ""
    notes = []
    stock = None if base is None or base is result else row(base, m)
    if stock is not None:
        notes.append(f"×{stock['median_ms'] / found['median_ms']:.1f}")
    share = share_of_limit(report, result, m)
    if share is not None and result["id"].startswith("ours/"):
        notes.append(f"{share:.0%}")
    if not notes:
        return f"{found['median_ms']:.2f}"
    joined = ",\N{NO-BREAK SPACE}".join(notes)  # a narrow cell is broken before the parenthesis
    return f"{found['median_ms']:.2f} ({joined})"


def _stock(report: Report) -> Report | None:
    return next((result for result in report["results"] if result["id"] == "vllm"), None)


def _rows(records: Sequence[Report]) -> list[int]:
    return sorted({r["m"] for report in records for x in report["results"] for r in x["rows"]})


def _about(records: Sequence[Report]) -> str:
    first = records[0]
    about = first["machine"]
    threads = f"{first['threads']} thread" + ("s" if first["threads"] > 1 else "")
    read = [report["limits"]["read_gb_per_s"] for report in records]
    bf16 = [report["limits"]["bf16_gemm_gflop_per_s"] for report in records]
    int8 = [report["limits"]["int8_gemm_gop_per_s"] for report in records]
    isas = ", ".join(sorted({report["machine"]["isa"] for report in records}))
    dates = sorted({report["machine"]["date"] for report in records})
    return (
        f"N={first['n']}, K={first['k']}, {threads} of {about['cpu']} ({isas}), "
        f"torch {about['torch']}, vLLM {about['vllm']}, {' to '.join(dates)}. Limits measured with "
        f"each kind: reading memory {_range(read)} GB/s, matrix products {_range(bf16)} GFLOP/s "
        f"(bf16) and {_range(int8)} GOP/s (int8)."
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def kinds(directory: Path) -> str:
    """Our kernel for each kind of weight."""
    records = reports(directory)
    ms = _rows(records)
    rows = []
    for report in records:
        found = ours_of(report)
        if not found:
            rows.append([report["title"], "", "no kernel yet", *[""] * (len(ms) - 1)])
            continue
        cells = [_cell(report, found[0], _stock(report), m) for m in ms]
        rows.append([report["title"], f"{found[0]['weight_bytes'] / 1e6:.1f}", *cells])
    caption = _caption(
        "Milliseconds per call, median. ×: speed relative to vLLM, if vLLM has a CPU kernel. %: "
        "share of the machine's limit, which for one token is reading the packed weights or "
        "decoding them from the cache, whichever is slower, and from 64 tokens on the best matrix "
        f"product. {_about(records)}"
    )
    head = ["weights", "MB", *(f"M={m}" for m in ms)]
    return f"{table(head, rows, len(head) - 1)}\n\n{caption}"


def one_token(directory: Path, best: Path) -> str:
    """Our kernels of older instruction sets for one token, beside those of the best one."""
    rows = []
    records = reports(directory)
    kinds = {report["scheme"]: report for report in reports(best)}
    for report in records:
        result = ours_of(report)[0]
        found, other = row(result, 1), row(ours_of(kinds[report["scheme"]])[0], 1)
        assert found is not None
        assert other is not None
        cached = report["limits"]["cached_gb_per_s"][result["id"].removeprefix("ours/")]
        rows.append(
            [
                report["title"],
                report["machine"]["isa"],
                f"{found['median_ms']:.2f}",
                f"{found['weight_gb_per_s']:.1f}",
                f"{cached:.1f}",
                f"{share_of_limit(report, result, 1):.0%}",
                f"{found['median_ms'] / other['median_ms']:.2f}",
            ]
        )
    best_isa = next(iter(kinds.values()))["machine"]["isa"]
    head = ["weights", "path", "ms", "GB/s", "decoded from the cache (GB/s)", "of the limit"]
    head.append(f"time relative to {best_isa}")
    return f"{table(head, rows, 5)}\n\n{_caption('One token. ' + _about(records))}"


def contenders(file: Path) -> str:
    """Everything that computes one kind of weight."""
    report = json.loads(file.read_text())
    ms = _rows([report])
    rows = [
        [
            result["name"],
            f"{result['weight_bytes'] / 1e6:.1f}",
            *(_cell(report, result, _stock(report), m) for m in ms),
        ]
        for result in report["results"]
    ]
    head = [report["title"], "MB", *(f"M={m}" for m in ms)]
    caption = _caption(
        "Milliseconds per call, median. ×: speed relative to vLLM. " + _about([report])
    )
    return f"{table(head, rows, len(head) - 1)}\n\n{caption}"


def serving(file: Path) -> str:
    """The engines that served one model."""
    report = json.loads(file.read_text())
    engines = list(report["engines"].values())
    streams = next(list(e["decode_tokens_per_s"]) for e in engines if "error" not in e)
    rows = []
    for engine in engines:
        if "error" in engine:
            # That the engine failed is said last, of what before it.
            said = engine["error"].splitlines()
            lines = [line for line in said if "See root cause above" not in line]
            rows.append([engine["name"], f"does not start: {lines[-1][:120]}", *[""] * 8])
            continue
        rows.append(
            [
                engine["name"],
                ", ".join(
                    f"{engine[key]:.0f}" for key in ("start_s", "start_again_s") if key in engine
                ),
                ", ".join(
                    f"{engine[key]['prepare_s']:.2f}"
                    for key in ("weights", "weights_again")
                    if key in engine
                ),
                f"{engine['first_token_s'] * 1e3:.0f}",
                f"{engine['prefill_tokens_per_s']:.0f}",
                *(f"{engine['decode_tokens_per_s'][s]:.1f}" for s in streams),
                f"{engine['peak_anonymous_bytes'] / 1e9:.2f}",
            ]
        )
    head = [
        "engine",
        "start, again (s)",
        "weights, again (s)",
        "first token (ms)",
        "prefill (tokens/s)",
    ]
    head += [f"{s} stream{'s' * (s != '1')} (tokens/s)" for s in streams] + ["peak (GB)"]
    about = report["machine"]
    caption = _caption(
        f"{report['title']} on {about['cpu']}, one core, torch {about['torch']}, "
        f"vLLM {about['vllm']}, {about['date']}. Prompts of {report['prefill_tokens']} tokens for "
        f"prefill and {report['short_prompt']} else, {report['output_tokens']} tokens of output. "
        "Start: with empty caches, then again with the caches of the first start, prepared weights "
        "included. Weights: the time to prepare them, or to find them in the cache. Peak: "
        "anonymous memory of all processes."
    )
    return f"{table(head, rows, len(head) - 1)}\n\n{caption}"


def preparation(file: Path) -> str:
    """How fast checkpoints become packed weights."""
    report = json.loads(file.read_text())
    ways = {"prepared": "at load", "standard": "by standard layout", "copied": "copying the result"}
    rows = [
        [
            found["layout"],
            f"{found['prepared'] * 1e3:.1f}",
            *(f"{found['bytes'] / found[way] / 1e9:.2f}" for way in ways),
        ]
        for found in report["layouts"]
    ]
    head = ["layout on disk", "ms", *(f"{title} (GB/s)" for title in ways.values())]
    about, first = report["machine"], report["layouts"][0]
    threads = f"{report['threads']} thread" + "s" * (report["threads"] > 1)
    caption = _caption(
        f"GB of packed codes per second, median; N={first['n']}, K={first['k']}, {threads} of "
        f"{about['cpu']} ({about['isa']}), {about['date']}."
    )
    return f"{table(head, rows, 4)}\n\n{caption}"


def step(file: Path) -> str:
    """Where one decode step of vLLM's worker spends its time."""
    report = json.loads(file.read_text())
    runs = list(report["runs"].values())

    def cells(figures: Sequence[float | None]) -> list[str]:
        return ["" if figure is None else f"{figure:.2f}" for figure in figures]

    rows = [[name, *cells([run["ms"].get(name) for run in runs])] for name in report["kinds"]]
    rows.append(["step", *cells([run["wall_ms"] for run in runs])])
    head = ["ms", *(run["name"] for run in runs)]
    about = report["machine"]
    caption = _caption(
        f"{report['title']}, {report['streams']} stream{'s' * (report['streams'] > 1)}, median of "
        f"{report['steps']} steps, "
        f"{about['cpu']}, vLLM {about['vllm']}, {about['date']}."
    )
    return f"{table(head, rows, len(head) - 1)}\n\n{caption}"
