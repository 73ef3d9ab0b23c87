# SPDX-License-Identifier: Apache-2.0
"""Linear layers of Llama 3 on a GPU: our backends, each of vLLM's kernel classes, and cuBLAS.

    python -m benchmarks.gpu_linear                     everything, written to build/benchmarks
    python -m benchmarks.gpu_linear int4 --model 8b --m 1 16 256

It needs an NVIDIA GPU. Every contender is first held against the exact product. Calls are captured
in a CUDA graph, as a server replays them, and go through so many copies of the weights that a call
finds none of them in the cache; graphs of all contenders take turns in random order, and medians
are reported. What the GPU can do at most, copying memory and multiplying in bf16, is measured in
the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from vllm.compressed_linear.backends.registry import REFERENCE, backends
from vllm.compressed_linear.backends.vllm_native import VllmNativeBackend, backend, op, table
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.commands.tune.random_weights import random_weights
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.machine.timing import captured
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import E2M1, E4M3, uint

ROWS = tuple(1 << i for i in range(13))
WEIGHTS: dict[str, WeightSpec] = {
    "int4": WeightSpec(uint(4, 8), ScaleSpec("bfloat16", "group", 128)),
    "int8": WeightSpec(uint(8, 128), ScaleSpec("bfloat16", "channel")),
    "fp8": WeightSpec(E4M3, ScaleSpec("float32", "channel")),
    "nvfp4": WeightSpec(E2M1, ScaleSpec("float8_e4m3fn", "group", 16), row_scale="float32"),
}
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
    "70b": {
        "qkv": (10240, 8192),
        "o": (8192, 8192),
        "gate_up": (57344, 8192),
        "down": (8192, 28672),
    },
}
"""Layers of Llama 3, (N, K), on one GPU: q, k and v are one layer, and so are gate and up."""

NO_GPU = "benchmarks.gpu_linear needs an NVIDIA GPU, and torch sees none here"
CUBLAS = "cuBLAS bf16"
CALLS_IN_GRAPH = 8
TOLERANCE = 0.02
"""Largest error relative to the largest output, in the check before timing."""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """One layer of one model with one kind of weights."""

    weights: str
    model: str
    name: str
    n: int
    k: int

    @property
    def descriptor(self) -> CompressedLinearDescriptor:
        return CompressedLinearDescriptor(
            self.k, self.n, WEIGHTS[self.weights], "bfloat16", "bfloat16"
        )


def layers(weights: Sequence[str], models: Sequence[str]) -> list[Layer]:
    """Everything that is measured, in order."""
    return [
        Layer(kind, model, name, n, k)
        for kind in weights
        for model in models
        for name, (n, k) in MODELS[model].items()
    ]


@dataclass
class Contender:
    """``call(x, tensors)`` on each of ``copies`` in turn."""

    name: str
    call: Callable[[torch.Tensor, Tensors], torch.Tensor]
    copies: list[Tensors]

    @property
    def weight_bytes(self) -> int:
        return sum(t.nbytes for t in self.copies[0].values())


def copies_of(tensors: Tensors, enough: int) -> list[Tensors]:
    """``tensors`` and clones of them, ``enough`` bytes or more altogether and two at least."""
    size = max(sum(t.nbytes for t in tensors.values()), 1)
    more = max(math.ceil(enough / size) - 1, 1)
    return [tensors, *({k: t.clone() for k, t in tensors.items()} for _ in range(more))]


def able(
    d: CompressedLinearDescriptor, platform: Platform
) -> tuple[dict[str, str | None], dict[str, str]]:
    """Names of what can run ``d``, each with the kernel class where it is one of vLLM's; and why
    the others cannot."""
    can: dict[str, str | None] = {}
    cannot: dict[str, str] = {}
    for name, registration in backends().items():
        if name in (REFERENCE, VllmNativeBackend.name):
            continue
        verdict = registration.backend.can_implement(d, platform)
        if verdict and registration.backend.contract(d).activation is None:
            can[name] = None
        else:
            cannot[name] = str(verdict)
    try:
        answers = table.answers(d, platform)
    except ValueError as error:
        # Ours and cuBLAS can be measured without vLLM.
        return can, cannot | {VllmNativeBackend.name: str(error)}
    for answer in answers:
        if answer.adapter is not None and not answer.reasons:
            can[f"vLLM {answer.kernel}"] = answer.adapter.tag
        else:
            cannot[f"vLLM {answer.kernel}"] = "; ".join(answer.reasons)
    return can, cannot


def contender(
    name: str,
    tag: str | None,
    d: CompressedLinearDescriptor,
    weights: CompressedWeights,
    platform: Platform,
    enough: int,
) -> Contender:
    """``name`` with its weights prepared on the GPU."""
    if tag is None:
        method = backends()[name].backend(d)
        prepared = method.prep_weights_for_execution(weights)
        return Contender(name, lambda x, t: method.apply(t, x), copies_of(prepared, enough))
    prepared = backend.prepare(d, weights, platform, table.by_tag(tag))
    text = op.text_of(d)
    return Contender(
        name,
        lambda x, t: op.call(d, text, t, x, None, platform.device),
        copies_of(prepared, enough),
    )


def cublas(exact: torch.Tensor, enough: int) -> Contender:
    """The weight as bf16, multiplied by cuBLAS."""
    return Contender(
        CUBLAS,
        lambda x, t: torch.nn.functional.linear(x, t["weight"]),
        copies_of({"weight": exact.to(torch.bfloat16)}, enough),
    )


def check(
    found: Contender, exact: torch.Tensor, m: int = 3, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Error relative to the largest output; ``SystemExit`` if it computes something else."""
    x = torch.randn(m, exact.shape[1], device=exact.device, dtype=dtype)
    expected = x.float() @ exact.t()
    error = (found.call(x, found.copies[0]).float() - expected).abs().max() / expected.abs().max()
    if not float(error) <= TOLERANCE:
        raise SystemExit(f"{found.name}: relative error {float(error):.3g}, it is another layer")
    return float(error)


def replayed(graph: torch.cuda.CUDAGraph, calls: int = CALLS_IN_GRAPH) -> float:
    """Seconds of one call, by events around a replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / calls


def in_turns(timed: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Seconds of ``rounds`` runs of each, in a random order every round; the first is dropped."""
    order = random.Random(0)
    seconds: list[list[float]] = [[] for _ in timed]
    for _ in range(rounds + 1):
        for index in order.sample(range(len(timed)), len(timed)):
            seconds[index].append(timed[index]())
    return [found[1:] for found in seconds]


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """The median in microseconds, and half the distance of the quartiles as a part of it."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"median_us": median * 1e6, "spread": (high - low) / 2 / median if median else 0.0}


def limits(rounds: int) -> dict[str, float]:
    """Bytes a second of a copy (read and written), operations a second of a bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copying, multiplying = (
        captured(lambda i: target.copy_(source), CALLS_IN_GRAPH),
        captured(lambda i: a @ b, CALLS_IN_GRAPH),
    )
    timed = [lambda: replayed(copying), lambda: replayed(multiplying)]
    copy, product = (min(seconds) for seconds in in_turns(timed, rounds))
    return {"copy_bytes_per_s": 2.0 * len(source) / copy, "bf16_per_s": 2.0 * 8192**3 / product}


def measure(layer: Layer, platform: Platform, rows: Sequence[int], rounds: int) -> dict[str, Any]:
    """The record of one layer."""
    d = layer.descriptor
    weights = random_weights(d, "cuda")
    exact = torch.cat([weights.dequantize(a, b) for a, b in weights.chunks()])
    enough = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    can, cannot = able(d, platform)
    found = [contender(name, tag, d, weights, platform, enough) for name, tag in can.items()]
    found.append(cublas(exact, enough))
    results: list[dict[str, Any]] = [
        {"name": c.name, "weight_bytes": c.weight_bytes, "error": check(c, exact), "rows": []}
        for c in found
    ]
    for m in rows:
        x = torch.randn(m, d.in_features, device="cuda", dtype=torch.bfloat16)
        graphs = [captured(_rotating(c, x), CALLS_IN_GRAPH) for c in found]
        timed = [_replay(graph) for graph in graphs]
        for result, seconds in zip(results, in_turns(timed, rounds), strict=True):
            result["rows"].append({"m": m, **summary(seconds)})
    return {**asdict(layer), "descriptor": str(d), "declined": cannot, "results": results}


def _rotating(found: Contender, x: torch.Tensor) -> Callable[[int], object]:
    return lambda i: found.call(x, found.copies[i % len(found.copies)])


def _replay(graph: torch.cuda.CUDAGraph) -> Callable[[], float]:
    return lambda: replayed(graph)


def share_of_roofline(
    record: Mapping[str, Any],
    result: Mapping[str, Any],
    row: Mapping[str, Any],
    reached: Mapping[str, float],
) -> float:
    """How much of what this GPU reached in copying or multiplying, whichever is the limit, a call
    reached. A copy reads and writes, a call only reads, so it may be a little over 1."""
    n, k, m = record["n"], record["k"], row["m"]
    moved = result["weight_bytes"] + 2 * m * (n + k)
    least = max(moved / reached["copy_bytes_per_s"], 2.0 * m * n * k / reached["bf16_per_s"])
    return float(least / (row["median_us"] / 1e6))


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """One table for each layer."""
    for record in report["layers"]:
        rows = [row["m"] for row in record["results"][0]["rows"]]
        shown = Table(
            title=f"{record['weights']}, Llama 3 {record['model']} {record['name']}: "
            f"N={record['n']} K={record['k']} on {report['gpu']}",
            caption="µs per call, × faster than cuBLAS in bf16, % of the roofline",
            title_justify="left",
        )
        shown.add_column("kernel")
        for m in rows:
            shown.add_column(f"M={m}", justify="right")
        base = next(r for r in record["results"] if r["name"] == CUBLAS)
        for result in record["results"]:
            cells = []
            for row, other in zip(result["rows"], base["rows"], strict=True):
                share = share_of_roofline(record, result, row, report["limits"])
                faster = other["median_us"] / row["median_us"]
                cells.append(f"{row['median_us']:.1f} ×{faster:.2f} {share:.0%}")
            shown.add_row(result["name"], *cells)
        yield shown


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("weights", nargs="*", metavar="WEIGHTS", help=", ".join(WEIGHTS))
    found.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    found.add_argument("--m", type=int, nargs="+", default=list(ROWS), help="rows of x")
    found.add_argument("--rounds", type=int, default=30, help="replays of each graph")
    found.add_argument("--output", type=Path, default=machine.BUILD / "gpu_linear.json")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    kinds = options.weights or list(WEIGHTS)
    if unknown := sorted(set(kinds) - set(WEIGHTS)):
        parser().error(f"unknown weights {unknown[0]} (known: {', '.join(WEIGHTS)})")
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    torch.manual_seed(0)
    platform = Platform.detect("cuda")
    console = Console(width=None if Console().is_terminal else 200)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        report: dict[str, Any] = {
            "gpu": platform.gpu,
            "platform": platform.name,
            "machine": machine.about(),
            "calls_in_graph": CALLS_IN_GRAPH,
            "limits": limits(options.rounds),
            "layers": [],
        }
        for layer in layers(kinds, options.model):
            record = measure(layer, platform, options.m, options.rounds)
            report["layers"].append(record)
            # After each, so that what an interrupted run has measured is kept.
            options.output.write_text(json.dumps(report, indent=1) + "\n")
            console.print(*tables({**report, "layers": [record]}))
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
