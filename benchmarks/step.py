# SPDX-License-Identifier: Apache-2.0
"""Where a decode step of vLLM spends its time, with this package and without it.

python -m benchmarks.step                          Gemma 3 270M, one stream
python -m benchmarks.step llama-3.2-1b --streams 16 --only ours vllm

Of llama.cpp it is the whole step: what vLLM's scheduler, worker and sampler may cost at most.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.serving import models
from benchmarks.serving.llama_engine import LlamaEngine
from benchmarks.serving.step_worker import KINDS, STEPS
from benchmarks.serving.vllm_engine import VllmEngine

USUAL = ("ours-head8", "ours", "vllm", "vllm-bf16", "llama")


def run(engine: models.Engine, streams: int, log: Path) -> dict[str, Any]:
    """The engine's step; RuntimeError if it does not get that far."""
    if isinstance(engine, LlamaEngine):
        return {"name": engine.name, "ms": {}, "wall_ms": engine.step_ms(log, streams, STEPS)}
    assert isinstance(engine, VllmEngine)
    return {"name": engine.name, **engine.worker("step_worker", log, str(streams))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="gemma-3-270m", choices=models.ALL)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="ENGINE", help="run these and keep the rest")
    parser.add_argument("--directory", type=Path, default=machine.BUILD / "step")
    arguments = parser.parse_args()
    # So that the process that is waited for is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments.directory.mkdir(parents=True, exist_ok=True)
    model = models.ALL[arguments.model]
    engines = model.engines
    name = f"{arguments.model}-{arguments.streams}"
    file = arguments.directory / f"{name}.json"
    report: dict[str, Any] = {"runs": {}}
    if arguments.only and file.is_file():
        report = json.loads(file.read_text())
    report |= {
        "title": model.title,
        "streams": arguments.streams,
        "steps": STEPS,
        "kinds": KINDS,
        "machine": machine.about(),
    }
    if missing := set(arguments.only or ()) - set(engines):
        parser.error(f"no engine {', '.join(missing)} (of {model.title}: {', '.join(engines)})")
    for key in arguments.only or (key for key in USUAL if key in engines):
        log = arguments.directory / f"{name}-{key}.log"
        report["runs"][key] = run(engines[key](), arguments.streams, log)
        file.write_text(json.dumps(report, indent=1) + "\n")
    table = Table(title=f"ms of a decode step, {model.title}", title_justify="left")
    table.add_column("")
    for result in report["runs"].values():
        table.add_column(result["name"], justify="right")
    for part in KINDS:
        cells = (result["ms"].get(part) for result in report["runs"].values())
        table.add_row(part, *("" if cell is None else f"{cell:.2f}" for cell in cells))
    table.add_row("step", *(f"{result['wall_ms']:.2f}" for result in report["runs"].values()))
    Console().print(table)


if __name__ == "__main__":
    main()
