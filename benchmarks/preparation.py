# SPDX-License-Identifier: Apache-2.0
"""How fast a checkpoint's weights become the packed layouts of the CPU kernels.

For each layout on disk: preparation as it is done at load (codes, scales and zero points, into new
memory), the same through the standard layout, and that with the packer's plain C++ loop. The limit
beside them is a copy of the packed bytes into new memory. Calls of all ways alternate; medians are
reported, in GB/s of packed codes. Also a decoder block of Llama-3-8B's shapes, all its layers.

    python -m benchmarks.preparation
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from vllm.compressed_linear.backends.cpu.int8 import CpuInt8Backend
from vllm.compressed_linear.backends.cpu.packing import Layout
from vllm.compressed_linear.backends.cpu.weight_only import CpuBackend
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import Part, refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.formats.awq import awq_gemm_scheme
from vllm.compressed_linear.formats.compressed_tensors_schemes import pack_quantized_scheme
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.prepare.malloc import large_blocks_apart
from vllm.compressed_linear.spec.descriptor import ActivationSpec, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import BF16, INT8, torch_dtype, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

GROUP = 128
BLOCK = {"qkv_proj": (6144, 4096), "o_proj": (4096, 4096), "gate_up_proj": (28672, 4096)} | {
    "down_proj": (4096, 14336)
}
"""(N, K) of the linear layers of one of Llama-3-8B's 32 decoder blocks."""

TOKEN = ActivationSpec(INT8, True, "token")

INT8_WEIGHT = CheckpointScheme(
    WeightSpec(uint(8, 128), ScaleSpec("float32", "channel", -1)),
    (
        StoredTensor(
            "weight", Role.CODES, "int8", ("N", "K"), Packing(8, "K", "int8", signed=True)
        ),
        StoredTensor("weight_scale", Role.SCALE, "float32", ("N", "G")),
    ),
    TOKEN,
)
"""int8 [N, K], as compressed-tensors writes W8A8."""

LAYOUTS: dict[str, CheckpointScheme] = {
    **{f"gptq-{b}": gptq_scheme(b, GROUP, version="gptq_v2") for b in (2, 3, 4, 8)},
    "gptq-4 act order": gptq_scheme(4, GROUP, version="gptq_v2"),
    "awq-4": awq_gemm_scheme(GROUP),
    **{
        f"compressed-tensors-{b}": pack_quantized_scheme(
            b, GROUP, symmetric=True, group_index=False
        )
        for b in (2, 3, 4, 5, 6, 8)
    },
    "bfloat16": CheckpointScheme(
        WeightSpec(BF16), (StoredTensor("weight", Role.CODES, "bfloat16", ("N", "K")),)
    ),
    "W8A8 int8": INT8_WEIGHT,
    "W8A8 int8, asymmetric x": replace(INT8_WEIGHT, activation=replace(TOKEN, symmetric=False)),
    **{
        f"W4A8 {name}": replace(scheme, activation=TOKEN)
        for name, scheme in (
            ("gptq-4", gptq_scheme(4, GROUP, version="gptq_v2")),
            (
                "compressed-tensors-4",
                pack_quantized_scheme(4, GROUP, symmetric=True, group_index=False),
            ),
        )
    },
}
"""What has quantized activations is prepared for the integer kernels, the rest for the others."""


def random_part(name: str, n: int, k: int) -> Part:
    """A layer of random codes in layout ``name``."""
    scheme = LAYOUTS[name]
    source = ShardSource("layer", scheme, n, k, 0, n, 0, k)
    tensors = {}
    for stored in scheme.tensors:
        shape = stored.shape(source.extents)
        if stored.role is Role.SCALE:
            tensors[stored.name] = torch.rand(shape).add_(0.5).half()
        elif stored.role is Role.CODES and stored.packing is None:
            tensors[stored.name] = torch.randn(shape).to(torch_dtype(stored.dtype))
        elif stored.role in (Role.CODES, Role.ZERO):
            words = torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64)
            tensors[stored.name] = words.to(torch_dtype(stored.dtype))
        elif stored.role is Role.GROUP_INDEX:
            index = torch.arange(k, dtype=torch.int32) // GROUP
            tensors[stored.name] = index[torch.randperm(k)] if "act order" in name else index
    shard = LoadedShard(source, tensors)
    [part] = refine([shard], LayerContext("bfloat16", "bfloat16"))
    return part


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    torch.ops.compressed_linear.select_isa("floats", name)
    try:
        yield
    finally:
        torch.ops.compressed_linear.select_isa("floats", "")


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def pack_standard(packed: torch.Tensor, part: Part, element: str, layout: Layout) -> None:
    """Fill ``packed`` through the standard layout."""
    pack_rows = torch.ops.compressed_linear.pack_rows
    shape = (part.descriptor.n, part.descriptor.group_size, element)
    for start, stop in part.weights.chunks(native.TILE):
        pack_rows(layout, packed, part.weights.rows(start, stop).codes.contiguous(), start, *shape)


def measure(part: Part, repetitions: int, *, plain: bool) -> dict[str, float]:
    """Median seconds of each way to prepare the layer, and its packed bytes."""
    integers = part.descriptor.activation is not None
    method = (CpuInt8Backend if integers else CpuBackend)(part.descriptor)
    layout: Layout = "quads" if integers else "planes"
    first = method.prep_weights_for_execution(part.weights)["packed"]

    def standard() -> None:
        packed = torch.empty_like(first)
        pack_standard(packed, part, method.element, layout)

    def plain_loop() -> None:
        with instruction_set("generic"):
            standard()

    def copied() -> None:
        target = torch.empty_like(first)
        torch.ops.compressed_linear.place(target)
        target.copy_(first)

    ways: dict[str, Callable[[], Any]] = {
        "prepared": lambda: method.prep_weights_for_execution(part.weights),
        "standard": standard,
        "copied": copied,
    }
    if plain:
        ways["plain"] = plain_loop
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions):
        for name in random.sample(list(ways), len(ways)):
            if name != "plain" or repetition < 2:
                with large_blocks_apart():
                    times[name].append(seconds(ways[name]))
    return {"bytes": float(first.nbytes)} | {n: statistics.median(t) for n, t in times.items()}


def layouts_table(names: list[str], n: int, k: int, repetitions: int) -> list[dict[str, Any]]:
    results = []
    for name in names:
        found = measure(random_part(name, n, k), repetitions, plain=True)
        results.append({"layout": name, "n": n, "k": k, **found})
    return results


def block_table(names: list[str], repetitions: int) -> list[dict[str, Any]]:
    """Sums over the layers of a decoder block."""
    results = []
    for name in names:
        total: dict[str, float] = {}
        for n, k in BLOCK.values():
            for key, value in measure(random_part(name, n, k), repetitions, plain=False).items():
                total[key] = total.get(key, 0.0) + value
        results.append({"layout": name, **total})
    return results


def render(title: str, results: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    columns = [c for c in ("prepared", "standard", "plain", "copied") if c in results[0]]
    for column in ("layout", *columns):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=True)
    for found in results:
        cells = [f"{found[c] * 1e3:.1f} ms, {found['bytes'] / found[c] / 1e9:.2f}" for c in columns]
        table.add_row(found["layout"], *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("layouts", nargs="*", default=list(LAYOUTS), help=", ".join(LAYOUTS))
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--block", nargs="*", default=["gptq-4", "awq-4", "compressed-tensors-4"])
    parser.add_argument("--isa", default="", help="an instruction set other than the best")
    parser.add_argument("--json", type=Path, default=machine.BUILD / "preparation.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native.load()
    if arguments.isa:
        torch.ops.compressed_linear.select_isa("floats", arguments.isa)
    record: dict[str, Any] = {
        "machine": machine.about() | {"isa": native.isa()},
        "threads": arguments.threads,
    }
    title = f"{native.isa()}, {arguments.threads} thread(s), GB/s of packed codes"
    layouts = layouts_table(arguments.layouts, arguments.n, arguments.k, arguments.repetitions)
    console = Console(width=110)
    console.print(render(f"N = {arguments.n}, K = {arguments.k}: {title}", layouts))
    record["layouts"] = layouts
    if arguments.block:
        record["block"] = block_table(arguments.block, max(arguments.repetitions // 3, 1))
        console.print(render(f"One decoder block of 8B shapes: {title}", record["block"]))
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
