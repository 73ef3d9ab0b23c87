# SPDX-License-Identifier: Apache-2.0
"""One linear layer of every kind: our kernels, vLLM's, zentorch's, torch's, and the limits.

Every contender is first checked against the exact product. Each keeps so many copies of its weights
that a call never finds them in the cache; turns of all contenders alternate in random order, and
medians are reported. vLLM runs in processes of its own, without this package, and decides on its
kernel itself. With one thread the clock is CPU time of the calling thread.

    python -m benchmarks.linear                        all kinds, written to build/benchmarks
    python -m benchmarks.linear w4 w8a8 --m 1 16 --isa avx2

A result is one file of JSON for each kind; ``python -m benchmarks.plots`` draws what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from benchmarks import aten, environments, limits, machine, ours, table
from benchmarks.contender import CACHE_MULTIPLE
from benchmarks.remote import STOCK, CannotRunError, Environment, RemoteContender, Vllm
from benchmarks.schemes import SCHEMES, Scheme
from benchmarks.timing import Timeable, in_turns, summary
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.settings import CPU_ISA
from vllm.compressed_linear.testing import Problem

ROWS = (1, 4, 16, 64, 256)
EXACT, LOOSE = 0.02, 0.06
"""Allowed error relative to the largest output: with x as it is, and with x quantized."""


class Contestant(Timeable, Protocol):
    """What ``run`` needs of ``Contender`` and ``RemoteContender``."""

    @property
    def name(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    def output(self, x: torch.Tensor) -> torch.Tensor: ...


def check(contestant: Contestant, problem: Problem) -> float:
    """Error relative to the largest output; ``SystemExit`` if it computes something else."""
    x = problem.activations(3)
    expected = problem.expected(x, None)
    error = (contestant.output(x).double() - expected).abs().max() / expected.abs().max()
    if not float(error) <= contestant.tolerance:
        raise SystemExit(f"{contestant.name}: relative error {error:.3g}, it is another layer")
    return float(error)


ALONE = {"zentorch-a16": ("w4",)}
"""Environments that differ from the others for some schemes only."""


def vllm_environments(zentorch: bool) -> dict[str, Environment]:
    """The vLLMs that are asked to run a scheme, by id."""
    found = {"vllm": STOCK}
    if zentorch:
        python = environments.zentorch()
        found["zentorch"] = Environment("vLLM with zentorch", python)
        # As it comes it quantizes the activations of 4-bit layers to 8 bits.
        exact = (("VLLM_CPU_INT4_W4A8", "0"),)
        found["zentorch-a16"] = Environment("vLLM with zentorch, W4A16", python, exact)
    return found


def vllm_contestants(
    name: str, scheme: Scheme, problem: Problem, processes: dict[str, Vllm]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """vLLM's layers of this scheme by id, and what vLLM said where it has none."""
    found: dict[str, Contestant] = {}
    refused: dict[str, str] = {}
    if not scheme.stock:
        return found, {"vllm": "vLLM has no kernel for CPUs that takes such weights"}
    for key, process in processes.items():
        if name not in ALONE.get(key, (name,)):
            continue
        exact = problem.descriptor.activation is None and (name, key) != ("w4", "zentorch")
        tolerance = EXACT if exact else LOOSE
        try:
            found[key] = RemoteContender(process, scheme.stock, problem, tolerance)
        except CannotRunError as error:
            refused[key] = str(error)
    return found, refused


def measure(
    name: str, problem: Problem, contestants: dict[str, Contestant], rows: Sequence[int], s: float
) -> list[dict[str, Any]]:
    """One record for each contestant with its times for each M."""
    results: list[dict[str, Any]] = []
    for key, contestant in contestants.items():
        error = check(contestant, problem)
        results.append(
            {
                "id": key,
                "name": contestant.name,
                "weight_bytes": contestant.weight_bytes,
                "error": error,
                "rows": [],
            }
        )
    for m in rows:
        times = in_turns(list(contestants.values()), problem.activations(m), s)
        summaries = [summary(seen) for seen in times]
        for result, found in zip(results, summaries, strict=True):
            seconds = found["median_ms"] / 1e3
            result["rows"].append(
                {
                    "m": m,
                    **found,
                    "gflop_per_s": 2 * m * problem.weight.numel() / seconds / 1e9,
                    "weight_gb_per_s": result["weight_bytes"] / seconds / 1e9,
                }
            )
    return results


def run(name: str, processes: dict[str, Vllm], arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of one scheme."""
    scheme = SCHEMES[name]
    facts = machine.about() | {"isa": native.isa(), "layout": native.layout_id()}
    problem = scheme.problem(arguments.n, arguments.k)
    can, cannot = ours.able(problem)
    contestants: dict[str, Contestant] = {
        f"ours/{backend}": ours.contender(problem, backend, variant)
        for backend, variant in can.items()
    }
    theirs, refused = vllm_contestants(name, scheme, problem, processes)
    contestants |= theirs
    contestants |= {f"aten/{i}": c for i, c in enumerate(aten.contenders(name, problem))}
    reached = limits.read_rate(arguments.seconds) | limits.gemm_rates(arguments.seconds)
    cached = {backend: ours.cached_rate(scheme, backend, 0.5) for backend in can}
    results = measure(name, problem, contestants, arguments.m, arguments.seconds)
    return {
        "scheme": name,
        "order": list(SCHEMES).index(name),
        "title": scheme.title,
        "descriptor": str(problem.descriptor),
        "integer": scheme.integer,
        "n": arguments.n,
        "k": arguments.k,
        "threads": arguments.threads,
        "clock": "CPU" if arguments.threads == 1 else "wall",
        "copies_times_cache": CACHE_MULTIPLE,
        "machine": facts | {"load_average_after": os.getloadavg()[0]},
        "limits": reached | {"cached_gb_per_s": cached},
        "declined": cannot,
        "refused": refused,
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("schemes", nargs="*", metavar="KIND", help=", ".join(SCHEMES))
    parser.add_argument("--n", type=int, default=4096, help="output channels")
    parser.add_argument("--k", type=int, default=4096, help="input channels")
    parser.add_argument("--m", type=int, nargs="+", default=list(ROWS), help="rows of x")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each M, at least")
    parser.add_argument("--isa", help="instruction set of our kernels, e.g. avx2")
    parser.add_argument("--no-zentorch", dest="zentorch", action="store_false")
    parser.add_argument("--directory", type=Path, default=machine.BUILD / "linear")
    arguments = parser.parse_args()
    unknown = set(arguments.schemes) - set(SCHEMES)
    if unknown:
        parser.error(f"unknown kind {', '.join(sorted(unknown))} (known: {', '.join(SCHEMES)})")
    if arguments.isa:
        os.environ[CPU_ISA] = arguments.isa
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if Console().is_terminal else 130)
    started = time.perf_counter()
    with torch.inference_mode(), ExitStack() as stack:
        processes = {k: Vllm(e) for k, e in vllm_environments(arguments.zentorch).items()}
        for process in processes.values():
            stack.callback(process.close)
        for name in arguments.schemes or SCHEMES:
            report = run(name, processes, arguments)
            console.print(*table.tables(report), sep="\n")
            suffix = f"-{arguments.isa}" if arguments.isa else ""
            file = arguments.directory / f"{name}{suffix}.json"
            file.write_text(json.dumps(report, indent=1) + "\n")
    seconds = time.perf_counter() - started
    console.print(f"written to {arguments.directory} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
