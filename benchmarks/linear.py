# SPDX-License-Identifier: Apache-2.0
"""One linear layer: our kernels, vLLM's, ATen's, a plain bf16 one, and what the machine allows.

All contenders compute the same layer and are checked against it before they are timed. Each keeps
enough copies of its weights that a call never finds them in the cache; calls of all contenders
alternate in random order, so that what disturbs one disturbs all; medians are reported. With one
thread the clock is that thread's CPU time, so that being scheduled away does not count; wall time
is recorded too.

    python benchmarks/linear.py --json build/benchmarks/linear.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from vllm.compressed_linear import native

Call = Callable[[torch.Tensor, int], torch.Tensor]
CACHE_MULTIPLE = 4  # weights of one contender together, in units of the last-level cache


@dataclass(frozen=True)
class Layer:
    """The layer everybody computes: ŵ = (codes − 8) · scale."""

    codes: torch.Tensor  # uint8 [N, K]
    scale: torch.Tensor  # bfloat16 [N, G]

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        return self.codes.shape[1]

    @property
    def group(self) -> int:
        return self.k // self.scale.shape[1]

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""
        return (self.codes.float() - 8) * self.scale.float().repeat_interleave(self.group, 1)


@dataclass(frozen=True)
class Contender:
    """``call(x, i)`` runs the layer on copy ``i`` of the weights. ``tolerance``: largest error
    relative to the largest output, for the check before timing."""

    name: str
    weight_bytes: int
    copies: int
    call: Call
    tolerance: float = 0.02


def cache_bytes() -> int:
    """Size of the last-level cache, 32 MiB if the system does not say."""
    sizes = [
        int(path.read_text().strip().removesuffix("K")) << 10
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if path.read_text().strip().endswith("K")
    ]
    return max(sizes, default=32 << 20)


def contender(
    name: str,
    call: Callable[..., torch.Tensor],
    tensors: tuple[torch.Tensor, ...],
    *,
    copy: Callable[[], tuple[torch.Tensor, ...]] | None = None,
    tolerance: float = 0.02,
) -> Contender:
    """``call(x, *tensors)`` on copies of ``tensors`` that exceed the cache by ``CACHE_MULTIPLE``.

    ``copy`` makes one where cloning would not give what preparation gives.
    """
    size = sum(t.numel() * t.element_size() for t in tensors)
    count = math.ceil(CACHE_MULTIPLE * cache_bytes() / size) + 1
    copies = [copy() if copy else tuple(t.clone() for t in tensors) for _ in range(count)]
    return Contender(name, size, count, lambda x, i: call(x, *copies[i % count]), tolerance)


def ours(layer: Layer, element: str) -> Contender:
    """Our kernel on 4-bit codes (``uint4``), on 8-bit codes, or on the weights in bf16."""
    native.load()
    ops = torch.ops.compressed_linear
    n, k = layer.n, layer.k
    group, bias = (k, 0) if element == "bf16" else (layer.group, 8)
    rows = layer.dequantize().bfloat16() if element == "bf16" else layer.codes
    tile_bytes = ops.packed_tile_bytes(k, group, element)
    scale = layer.scale.unflatten(0, (-1, native.TILE)).transpose(1, 2).contiguous()

    def prepare() -> tuple[torch.Tensor, ...]:
        packed = torch.empty(n // native.TILE, tile_bytes, dtype=torch.uint8)
        ops.pack_rows(packed, rows, 0, n, group, element)
        return (packed,) if element == "bf16" else (packed, scale.clone())

    def call(
        x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        return ops.linear(
            x, packed, scale, None, None, None, None, n, k, group, element, bias, x.dtype
        )

    label = {"uint4": "4-bit", "uint8": "8-bit", "bf16": "bf16"}[element]
    return contender(f"ours, {label}", call, prepare(), copy=prepare)


def vllm_int4(layer: Layer) -> Contender:
    """What stock vLLM runs on a CPU without AMX, its weights laid out as its own code does."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        pack_quantized_values_into_int32,
    )
    from vllm.scalar_type import scalar_types

    from vllm import _custom_ops as vllm_ops

    packed = pack_quantized_values_into_int32(
        layer.codes.t().contiguous().int(), scalar_types.uint4b8, 1
    )
    tiled = packed.view(layer.k, -1, 2).permute(1, 0, 2).reshape(-1, layer.k * 2).contiguous()

    def call(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return vllm_ops.cpu_gemm_wna16(x, weight, scale, None, None, 8, "vec")

    return contender("vLLM cpu_gemm_wna16, 4-bit", call, (tiled, layer.scale.t().contiguous()))


def aten_int4(layer: Layer) -> Contender:
    ops = torch.ops.aten
    packed = ops._convert_weight_to_int4pack_for_cpu(layer.codes.int(), 2)
    scale = layer.scale.t().contiguous()
    scale_zero = torch.stack([scale, torch.zeros_like(scale)], 2).contiguous()

    def call(x: torch.Tensor, weight: torch.Tensor, scale_zero: torch.Tensor) -> torch.Tensor:
        return ops._weight_int4pack_mm_for_cpu(x, weight, layer.group, scale_zero)

    return contender("ATen int4pack, 4-bit", call, (packed, scale_zero))


def aten_int8(layer: Layer) -> Contender:
    """8-bit weights per channel: another quantization of the same matrix, so only roughly equal."""
    wide = layer.dequantize()
    scale = wide.abs().amax(1) / 127
    weight = (wide / scale[:, None]).round().to(torch.int8)
    return contender(
        "ATen int8pack, 8-bit",
        torch.ops.aten._weight_int8pack_mm,
        (weight, scale.bfloat16()),
        tolerance=0.05,
    )


def plain_bf16(layer: Layer) -> Contender:
    return contender("F.linear, bf16", F.linear, (layer.dequantize().bfloat16(),))


CONTENDERS: dict[str, Callable[[Layer], Contender]] = {
    "ours-4": lambda layer: ours(layer, "uint4"),
    "ours-8": lambda layer: ours(layer, "uint8"),
    "ours-bf16": lambda layer: ours(layer, "bf16"),
    "vllm-4": vllm_int4,
    "aten-4": aten_int4,
    "aten-8": aten_int8,
    "linear-bf16": plain_bf16,
}
BASELINE = "vllm-4"


def check(contestant: Contender, layer: Layer) -> None:
    """``SystemExit`` if the contender computes something else."""
    x = torch.randn(3, layer.k).bfloat16()
    expected = x.float() @ layer.dequantize().t()
    error = float((contestant.call(x, 0).float() - expected).abs().max() / expected.abs().max())
    if not error <= contestant.tolerance:
        raise SystemExit(
            f"{contestant.name}: relative error {error:.3g}, it computes another layer"
        )


@dataclass(frozen=True)
class Elapsed:
    """Seconds of one call: on the wall clock, and of CPU time of the calling thread."""

    wall: float
    cpu: float

    @property
    def counted(self) -> float:
        return self.cpu if torch.get_num_threads() == 1 else self.wall


def timed(action: Callable[[], object]) -> Elapsed:
    wall, cpu = time.perf_counter(), time.thread_time()
    action()
    cpu = time.thread_time() - cpu
    return Elapsed(time.perf_counter() - wall, cpu)


def best_seconds(action: Callable[[], object], seconds: float) -> float:
    """Shortest of as many runs as fit into ``seconds``."""
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, timed(action).counted)
    return best


def machine_limits() -> dict[str, float]:
    """Best rates seen with the threads in use: reading memory, and multiplying bf16 matrices."""
    big = torch.ones(max(CACHE_MULTIPLE * cache_bytes(), 256 << 20) // 4)
    reads = (lambda: torch.dot(big, big), lambda: big.sum(), lambda: big.max())
    seconds = min(best_seconds(read, 0.7) for read in reads)
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    gemm = best_seconds(lambda: F.linear(a, b), 1.5)
    return {
        "read_gb_per_s": big.numel() * 4 / seconds / 1e9,
        "bf16_gemm_gflop_per_s": 2 * 2048**3 / gemm / 1e9,
    }


def measure(
    contenders: Sequence[Contender], layer: Layer, m: int, seconds: float
) -> list[list[Elapsed]]:
    """Times of each call of each contender, one list for each."""
    x = torch.randn(m, layer.k).bfloat16()
    for contestant in contenders:
        contestant.call(x, 0)
    times: list[list[Elapsed]] = [[] for _ in contenders]
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        rounds += 1
        # In another order each time: who ran before decides what the caches and the core hold.
        for index in torch.randperm(len(contenders)).tolist():
            times[index].append(timed(partial(contenders[index].call, x, rounds)))
    return times


def machine() -> dict[str, Any]:
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    import vllm

    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "cache_bytes": cache_bytes(),
        "isa": native.isa(),
        "layout": native.layout_id(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "load_average_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def show(report: dict[str, Any]) -> None:
    about, limits = report["machine"], report["limits"]
    rows = [r["m"] for r in report["results"][0]["rows"]]
    table = Table(
        title=f"N={report['n']} K={report['k']} group={report['group']}, {report['threads']} "
        f"thread(s), {about['cpu']} ({about['isa']})",
        caption=f"ms per call (median of {report['clock']} time), and how many times as fast as "
        "stock vLLM",
    )
    table.add_column("kernel")
    table.add_column("MB", justify="right")
    for m in rows:
        table.add_column(f"M={m}", justify="right")
    for result in report["results"]:
        cells = [
            f"{row['median_ms']:.3f}"
            + (f" [green]×{row['speedup']:.1f}[/]" if row["speedup"] is not None else "")
            for row in result["rows"]
        ]
        table.add_row(result["name"], f"{result['weight_bytes'] / 1e6:.1f}", *cells)
    limit = []
    for m in rows:
        best = report["results"][0]["weight_bytes"] / limits["read_gb_per_s"] / 1e6
        work = 2 * m * report["n"] * report["k"] / limits["bf16_gemm_gflop_per_s"] / 1e6
        limit.append(f"{max(best, work):.3f}")
    table.add_section()
    table.add_row("limit of 4-bit weights on this machine", "", *limit)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"read bandwidth {limits['read_gb_per_s']:.1f} GB/s, bf16 GEMM "
        f"{limits['bf16_gemm_gflop_per_s']:.0f} GFLOP/s, load before {about['load_average_before']}"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    about = machine()
    n, k = arguments.n, arguments.k
    layer = Layer(
        torch.randint(0, 16, (n, k), dtype=torch.uint8),
        (0.5 + torch.rand(n, k // arguments.group)).mul(0.01).bfloat16(),
    )
    names = arguments.only or list(CONTENDERS)
    contenders = [CONTENDERS[name](layer) for name in names]
    for contestant in contenders:
        check(contestant, layer)
    limits = machine_limits()
    results: list[dict[str, Any]] = [
        {"id": name, "name": c.name, "weight_bytes": c.weight_bytes, "copies": c.copies, "rows": []}
        for name, c in zip(names, contenders, strict=True)
    ]
    for m in arguments.m:
        times = measure(contenders, layer, m, arguments.seconds)
        medians = [statistics.median(t.counted for t in seen) for seen in times]
        base = medians[names.index(BASELINE)] if BASELINE in names else None
        for result, seen, median in zip(results, times, medians, strict=True):
            result["rows"].append(
                {
                    "m": m,
                    "median_ms": median * 1e3,
                    "best_ms": min(t.counted for t in seen) * 1e3,
                    "median_wall_ms": statistics.median(t.wall for t in seen) * 1e3,
                    "calls": len(seen),
                    "gflop_per_s": 2 * m * n * k / median / 1e9,
                    "weight_gb_per_s": result["weight_bytes"] / median / 1e9,
                    "speedup": None if base is None else base / median,
                }
            )
    return {
        "n": n,
        "k": k,
        "group": arguments.group,
        "threads": arguments.threads,
        "clock": "CPU" if arguments.threads == 1 else "wall",
        "machine": about | {"load_average_after": os.getloadavg()[0]},
        "limits": limits,
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096, help="output channels, a multiple of 32")
    parser.add_argument("--k", type=int, default=4096, help="input channels, a multiple of 32")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="rows of x")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each M")
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), help="contenders to run")
    parser.add_argument("--json", type=Path, default=Path("build/benchmarks/linear.json"))
    arguments = parser.parse_args()
    report = run(arguments)
    show(report)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
