# SPDX-License-Identifier: Apache-2.0
"""Whole models, as a client sees them: ours, vLLM without this package, and llama.cpp.

Each engine is started in processes of its own and asked the same: a prompt of 512 tokens, and
greedy answers of 128 tokens for 1, 4 and 16 clients at once. vLLM is asked over HTTP; llama.cpp
through its C interface, without a server. vLLM gives its worker one core on a machine of two, and
llama.cpp gets one thread.

    python -m benchmarks.serve                             Gemma 3 270M and the 1B
    python -m benchmarks.serve llama-3.2-1b --only ours vllm

A result is one file of JSON for each model; an engine that is run again replaces its part.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.serving import models
from benchmarks.serving.workload import OUTPUT_TOKENS, PREFILL_TOKENS, SHORT_PROMPT, STREAMS

USUAL = ("gemma-3-270m", "llama-3.2-1b")
"""The 8B takes 40 GB of disk and an hour, so it is only run when it is named."""


def show(report: dict[str, Any], console: Console) -> None:
    """The record as a table."""
    table = Table(title=f"{report['title']}, {report['machine']['cpu']}", title_justify="left")
    table.add_column("engine")
    heads = ("start s", "again s", "first token ms", "prefill tokens/s")
    for head in (*heads, *(f"tokens/s, {s} streams" for s in STREAMS), "peak MB"):
        table.add_column(head, justify="right")
    for engine in report["engines"].values():
        if "error" in engine:
            table.add_row(engine["name"], f"[red]{engine['error'][:100]}[/]")
            continue
        decode = engine["decode_tokens_per_s"]
        table.add_row(
            engine["name"],
            f"{engine['start_s']:.1f}" if "start_s" in engine else "",
            f"{engine['start_again_s']:.1f}" if "start_again_s" in engine else "",
            f"{engine['first_token_s'] * 1e3:.0f}",
            f"{engine['prefill_tokens_per_s']:.0f}",
            *(f"{decode[str(s)]:.1f}" for s in STREAMS),
            f"{engine['peak_anonymous_bytes'] / 1e6:.0f}",
        )
    console.print(table)


def run(
    engine: models.Engine, log: Path, vocabulary: int, *, restart: bool, tokens: int
) -> dict[str, Any]:
    """The engine's figures, or what it said when it did not start."""
    facts = machine.about()
    started = time.perf_counter()
    try:
        figures = engine.run(log, vocabulary, restart=restart, tokens=tokens)
    except RuntimeError as error:
        figures = {"error": str(error)}
    seconds = time.perf_counter() - started
    return {"name": engine.name, **figures, "machine": facts, "benchmark_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(models.ALL))
    parser.add_argument("--only", nargs="+", metavar="ENGINE", help="run these and keep the rest")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start vLLM a second time, to see what its caches are worth",
    )
    parser.add_argument(
        "--output-tokens",
        type=int,
        default=OUTPUT_TOKENS,
        help="answers of so many tokens, fewer for large models (default: %(default)s)",
    )
    parser.add_argument("--directory", type=Path, default=machine.BUILD / "serve")
    arguments = parser.parse_args()
    # So that servers are stopped too: they run in sessions of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    unknown = set(arguments.models) - set(models.ALL)
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)} (known: {', '.join(models.ALL)})")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if Console().is_terminal else 130)
    for name in arguments.models or USUAL:
        model = models.ALL[name]
        file = arguments.directory / f"{name}.json"
        report: dict[str, Any] = {"engines": {}}
        if arguments.only and file.is_file():
            report = json.loads(file.read_text())
        report |= {
            "model": name,
            "title": model.title,
            "prefill_tokens": PREFILL_TOKENS,
            "short_prompt": SHORT_PROMPT,
            "output_tokens": arguments.output_tokens,
            "machine": machine.about(),
        }
        engines = model.engines
        if missing := set(arguments.only or ()) - set(engines):
            parser.error(f"no engine {', '.join(missing)} (of {name}: {', '.join(engines)})")
        for key in arguments.only or engines:
            console.print(f"{model.title}: {key}: what it serves …")
            engine = engines[key]()
            console.print(f"{model.title}: {engine.name} …")
            log = arguments.directory / f"{name}-{key}.log"
            report["engines"][key] = run(
                engine,
                log,
                model.vocabulary,
                restart=arguments.restart,
                tokens=arguments.output_tokens,
            )
            report["engines"] = {k: report["engines"][k] for k in engines if k in report["engines"]}
            file.write_text(json.dumps(report, indent=1) + "\n")
        show(report, console)


if __name__ == "__main__":
    main()
