# SPDX-License-Identifier: Apache-2.0
"""Results of whole models and of loading as Markdown; ``docs/generate.py`` puts them into its
pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import caption, table


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
    text = caption(
        f"{report['title']} on {about['cpu']}, one core, torch {about['torch']}, "
        f"vLLM {about['vllm']}, {about['date']}. Prompts of {report['prefill_tokens']} tokens for "
        f"prefill and {report['short_prompt']} else, {report['output_tokens']} tokens of output. "
        "Start: with empty caches, then again with the caches of the first start, prepared weights "
        "included. Weights: the time to prepare them, or to find them in the cache. Peak: "
        "anonymous memory of all processes."
    )
    return f"{table(head, rows, len(head) - 1)}\n\n{text}"


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
    text = caption(
        f"GB of packed codes per second, median; N={first['n']}, K={first['k']}, {threads} of "
        f"{about['cpu']} ({about['isa']}), {about['date']}."
    )
    return f"{table(head, rows, 4)}\n\n{text}"


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
    text = caption(
        f"{report['title']}, {report['streams']} stream{'s' * (report['streams'] > 1)}, median of "
        f"{report['steps']} steps, "
        f"{about['cpu']}, vLLM {about['vllm']}, {about['date']}."
    )
    return f"{table(head, rows, len(head) - 1)}\n\n{text}"
