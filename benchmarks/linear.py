# SPDX-License-Identifier: Apache-2.0
"""One linear layer of every kind: our kernels, vLLM's, zentorch's, torch's, and the limits.

Every contender is first checked against the exact product. Each keeps so many copies of its weights
that a call never finds them in the cache, as far as memory and time allow; turns of all contenders
alternate in random order, and medians are reported. vLLM runs in processes of its own, without this
package, and decides on its kernel itself; where it would round x to 8 bits unasked, it is also run
without that. With one thread the clock is CPU time of the calling thread.

    python -m benchmarks.linear                        all kinds, written to build/benchmarks
    python -m benchmarks.linear w4 w8a8 --m 1 16 --isa avx2 --threads 1

A result is one file of JSON for each kind and number of threads; ``python -m benchmarks.plots``
draws what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import aten, contest, environments, families, limits, machine, ours, table
from benchmarks.contender import Contender
from benchmarks.contest import EXACT, LOOSE, Contestant
from benchmarks.environments import NoEnvironmentError
from benchmarks.remote import (
    STOCK,
    STOCK_DEFAULT,
    X_AS_IT_IS,
    CannotRunError,
    Environment,
    RemoteContender,
    Vllm,
)
from benchmarks.rotation import CACHE_MULTIPLE
from benchmarks.schemes import SCHEMES, Scheme
from benchmarks.timing import Timeable, allow_tiles
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.settings import CPU_ISA
from vllm.compressed_linear.testing import Problem

ROWS = (1, 4, 16, 64, 256)
FIXED_ROWS = 16
"""Up to so many rows the fixed cost of a call is measured; for more it does not matter."""

BY_DEFAULT = ("vllm-default", "zentorch")
"""Environments in which vLLM may round the x of 4-bit layers: for other layers they are what is
measured anyway."""


def vllm_environments(zentorch: bool) -> tuple[dict[str, Environment], dict[str, str]]:
    """The vLLMs that are asked to run a scheme, by id, and why others are not there."""
    found = {"vllm": STOCK, "vllm-default": STOCK_DEFAULT}
    if not zentorch:
        return found, {}
    try:
        python = environments.zentorch()
    except NoEnvironmentError as error:
        return found, {"zentorch": str(error)}
    found["zentorch-a16"] = Environment("vLLM with zentorch", python, X_AS_IT_IS)
    found["zentorch"] = Environment("vLLM with zentorch by default", python)
    return found, {}


def vllm_contestants(
    scheme: Scheme, problem: Problem, processes: Mapping[str, Vllm]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """vLLM's layers of this scheme by id, and what vLLM said where it has none."""
    found: dict[str, Contestant] = {}
    refused: dict[str, str] = {}
    if not scheme.stock:
        return found, {"vllm": "vLLM has no kernel for CPUs that takes such weights"}
    tolerance = EXACT if problem.descriptor.activation is None else LOOSE
    for key, process in processes.items():
        if key in BY_DEFAULT and scheme.stock != "wna16":
            continue
        try:
            contestant = RemoteContender(process, scheme.stock, problem, tolerance)
        except CannotRunError as error:
            refused[key] = str(error)
            continue
        if key in BY_DEFAULT and contest.contract_of(contestant, problem) != contest.X_ROUNDED:
            refused[key] = "computes the same as without the default"
        else:
            found[key] = contestant
    return found, refused


def measure(
    problem: Problem,
    contestants: Mapping[str, Contestant],
    fixed: Mapping[str, ours.Fixed],
    rows: Sequence[int],
    seconds: float,
) -> list[dict[str, Any]]:
    """One record for each contestant with its times for each M. ``fixed``: by the id of a
    contestant, what measures the fixed cost of its calls."""
    results = contest.records(contestants, problem)
    for m in rows:
        x = problem.activations(m)
        timed: dict[str, Timeable] = {**contestants}
        if m <= FIXED_ROWS:
            timed |= {f"fixed of {key}": small for key, small in fixed.items()}
        found = contest.times_in_turns(timed, x, seconds)
        for result in results:
            key, size = result["id"], result["weight_bytes"]
            row = {"m": m, **found[key]}
            row |= contest.rates(row, m, problem.weight.numel(), size)
            contestant = contestants[key]
            if isinstance(contestant, Contender) and key.startswith("ours/"):
                row["kernel"] = ours.kernel_of(contestant, x)
            if (small := found.get(f"fixed of {key}")) is not None:
                row["fixed_ms"] = small["median_ms"]
                row["op_gb_per_s"] = contest.without_fixed(
                    row["median_ms"], row["fixed_ms"], size, fixed[key].weight_bytes
                )
            result["rows"].append(row)
    return results


def run(name: str, processes: Mapping[str, Vllm], arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of one scheme."""
    scheme, threads = SCHEMES[name], torch.get_num_threads()
    facts = machine.about() | {"isa": native.isa(), "layout": native.layout_id()}
    problem = scheme.problem(arguments.n, arguments.k)
    can, cannot = ours.able(problem)
    own = {backend: ours.contender(problem, backend) for backend in can}
    fixed = {f"ours/{b}": ours.Fixed(scheme, b, c, arguments.k) for b, c in own.items()}
    theirs, refused = vllm_contestants(scheme, problem, processes)
    contestants: dict[str, Contestant] = {}
    if (choice := ours.choice(problem)) not in own:
        contestants[f"ours/{choice}"] = ours.chosen(problem)
    contestants |= {f"ours/{b}": c for b, c in own.items()}
    contestants |= theirs
    contestants |= {f"aten/{i}": c for i, c in enumerate(aten.contenders(name, problem))}
    reached: dict[str, Any] = limits.read_rate(arguments.seconds)
    reached["products"] = limits.product_rates(arguments.seconds)
    # One thread: what lies in the caches of one core is not in those of another.
    cached = {b: ours.cached_rate(scheme, b, 0.5) for b in can} if threads == 1 else {}
    results = measure(problem, contestants, fixed, arguments.m, arguments.seconds)
    return {
        "scheme": name,
        "order": list(SCHEMES).index(name),
        "title": scheme.title,
        "descriptor": str(problem.descriptor),
        "integer": scheme.integer,
        "chosen": f"ours/{choice}",
        "n": arguments.n,
        "k": arguments.k,
        "threads": threads,
        "forced_isa": arguments.isa,
        "clock": "CPU" if threads == 1 else "wall",
        "copies_times_cache": CACHE_MULTIPLE,
        "machine": facts | {"load_average_after": os.getloadavg()[0]},
        "limits": reached | {"cached_gb_per_s": cached},
        "declined": cannot,
        "refused": refused,
        "results": results,
    }


def file_of(name: str, isa: str | None, threads: int) -> str:
    """The file's name of a record."""
    parts = [name, *([isa] if isa else []), *([f"{threads}-threads"] if threads > 1 else [])]
    return "-".join(parts) + ".json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schemes", nargs="*", metavar="KIND", help=", ".join(SCHEMES))
    parser.add_argument("--n", type=int, default=4096, help="output channels")
    parser.add_argument("--k", type=int, default=4096, help="input channels")
    parser.add_argument("--m", type=int, nargs="+", default=list(ROWS), help="rows of x")
    every = sorted({1, os.cpu_count() or 1})
    parser.add_argument("--threads", type=int, nargs="+", default=every, help="one core and all")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each M, at least")
    parser.add_argument("--isa", help="instruction set of our kernels, e.g. avx2")
    # On other processors vLLM does not use it.
    amd = families.vendor() == "AuthenticAMD"
    parser.add_argument("--zentorch", action=argparse.BooleanOptionalAction, default=amd)
    parser.add_argument("--directory", type=Path, default=machine.BUILD / "linear")
    arguments = parser.parse_args()
    unknown = set(arguments.schemes) - set(SCHEMES)
    if unknown:
        parser.error(f"unknown kind {', '.join(sorted(unknown))} (known: {', '.join(SCHEMES)})")
    if arguments.isa:
        os.environ[CPU_ISA] = arguments.isa
    torch.manual_seed(0)
    allow_tiles()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if Console().is_terminal else 130)
    started = time.perf_counter()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        with torch.inference_mode(), ExitStack() as stack:
            where, absent = vllm_environments(arguments.zentorch)
            processes = {key: Vllm(environment) for key, environment in where.items()}
            for process in processes.values():
                stack.callback(process.close)
            for name in arguments.schemes or SCHEMES:
                report = run(name, processes, arguments)
                report["refused"] |= absent
                console.print(*table.tables(report), sep="\n")
                file = arguments.directory / file_of(name, arguments.isa, threads)
                file.write_text(json.dumps(report, indent=1) + "\n")
    seconds = time.perf_counter() - started
    console.print(f"written to {arguments.directory} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
