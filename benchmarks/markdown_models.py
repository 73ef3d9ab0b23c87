# SPDX-License-Identifier: Apache-2.0
"""Results of whole models and of loading as Markdown; ``docs/generate.py`` puts them into its
pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def schemes(file: Path) -> str:
    """One model in several schemes: each with this package, next to vLLM alone on the same files.

    The record's engines are named ``ours-SCHEME-alone`` and ``vllm-SCHEME-alone``.
    """
    report = json.loads(file.read_text())
    engines = report["engines"]
    names = [key.removeprefix("ours-").removesuffix("-alone") for key in engines if "ours-" in key]
    rows = []
    for name in names:
        ours, stock = engines[f"ours-{name}-alone"], engines.get(f"vllm-{name}-alone")
        kernels = [f"{count} × {kernel}" for kernel, count in ours["kernels"].items()]
        rows.append([name, ", ".join(kernels), *_against(ours, stock), _without_us(stock)])
    streams = list(engines[f"ours-{names[0]}-alone"]["decode_tokens_per_s"])
    head = ["scheme", "layers × kernel", "prefill (tokens/s)"]
    head += [f"{s} stream{'s' * (s != '1')} (tokens/s)" for s in streams] + ["vLLM alone"]
    about = report["machine"]
    text = caption(
        f"{report['title']}, ×: as many times the tokens of vLLM alone on the same files. One "
        f"thread of {about['cpu']}, no server, torch {about['torch']}, vLLM {about['vllm']}, "
        f"{about['date']}. Prompts of {report['prefill_tokens']} tokens for prefill and "
        f"{report['short_prompt']} else, {report['output_tokens']} tokens of output."
    )
    return f"{table(head, rows, 0)}\n\n{text}"


def _against(ours: dict[str, Any], stock: dict[str, Any] | None) -> list[str]:
    """Tokens per second of prefill and of each number of streams, with their ratios to vLLM's."""

    def rates(engine: dict[str, Any]) -> list[float]:
        return [engine["prefill_tokens_per_s"], *engine["decode_tokens_per_s"].values()]

    if stock is None or "error" in stock:
        return [f"{rate:.0f}" for rate in rates(ours)]
    pairs = zip(rates(ours), rates(stock), strict=True)
    return [f"{rate:.0f} (×{rate / other:.2g})" for rate, other in pairs]


def _without_us(stock: dict[str, Any] | None) -> str:
    if stock is None:
        return "*not measured*"
    if "error" in stock:
        return f"does not start: {stock['error'].split(': ', 1)[-1][:110]}"
    return ", ".join(stock["selected"])


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
