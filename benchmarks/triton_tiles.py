# SPDX-License-Identifier: Apache-2.0
"""Measures how the Triton kernel's work is best cut on the GPU that is here.

    python -m benchmarks.triton_tiles                  writes backends/triton/measured.json
    python -m benchmarks.triton_tiles --output FILE    writes elsewhere

For each class of calls that ``triton_tiles`` tells apart: the table's tiles, and those that differ
from them in one thing, on layers of Llama 3 8B. What does not compile or fit is left out, and each
is held against the exact product before it is timed. Calls are replayed from CUDA graphs and take
turns. The tiles with the least geometric mean over the layers are written where serving reads them;
nothing is searched while serving.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.gpu_linear import MODELS, Contender, check, copies_of
from vllm.compressed_linear.backends.triton import launch
from vllm.compressed_linear.backends.triton import measured as triton_measured
from vllm.compressed_linear.backends.triton.backend import TritonBackend
from vllm.compressed_linear.backends.triton.measured import EVERY_M, TileClass, Tiles
from vllm.compressed_linear.backends.triton.spec import KernelSpec
from vllm.compressed_linear.commands.tune.random_weights import random_weights
from vllm.compressed_linear.machine import timing
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.machine.timing import Clock
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import NF4, torch_dtype, uint

NO_GPU = "benchmarks.triton_tiles needs an NVIDIA GPU, and torch sees none here"
LAYERS = ("o", "gate_up", "down")
LARGE_M = 512
"""Tokens by which the class without a largest M is measured."""
CALLS_IN_GRAPH = 8
KINDS: dict[str, tuple[WeightSpec, str]] = {
    "int4": (WeightSpec(uint(4, 8), ScaleSpec("bfloat16", "group", 128)), "bfloat16"),
    "int8": (WeightSpec(uint(8, 128), ScaleSpec("bfloat16", "channel")), "bfloat16"),
    "int4 by fp32": (WeightSpec(uint(4, 8), ScaleSpec("bfloat16", "group", 128)), "float32"),
    "int8 by fp32": (WeightSpec(uint(8, 128), ScaleSpec("bfloat16", "channel")), "float32"),
    "nf4 by fp16": (WeightSpec(NF4, ScaleSpec("float32", "group", 64)), "float16"),
}
"""One kind of weights for each thing that is multiplied and each width of codes, with x's dtype.
Codebooks of 5 to 8 bits, of which there are no checkpoints, keep the table's tiles."""

Timed = Callable[[int], object]


@dataclass(frozen=True)
class Best:
    """``tiles``, ``seconds`` of a call on each layer, and how much faster than the ``declared``
    ones: their seconds over these, the geometric mean."""

    tiles: Tiles
    seconds: tuple[float, ...]
    faster: float


def candidates(declared: Tiles) -> list[Tiles]:
    """``declared`` first, then what differs from it in one thing."""
    d = declared
    other = [replace(d, stages=s) for s in (2, 3, 4, 5, 6) if s != d.stages]
    other += [replace(d, warps=w) for w in (4, 8) if w != d.warps]
    other += [replace(d, block_k=k) for k in (32, 64, 128) if k != d.block_k]
    other += [replace(d, block_n=n) for n in (64, 128) if n != d.block_n]
    return [d, *other]


def fastest(
    tried: Sequence[Tiles], timed: Sequence[Sequence[Timed]], *, budget: float, now: Clock
) -> Best:
    """Of ``tried``, the declared ones first, by ``timed``: for each layer, a call for each."""
    seconds = [
        [found.median / CALLS_IN_GRAPH for found in timing.measure(calls, budget=budget, now=now)]
        for calls in timed
    ]
    by_tiles = list(zip(*seconds, strict=True))
    means = [math.exp(sum(math.log(max(s, 1e-12)) for s in of)) for of in by_tiles]
    best = means.index(min(means))
    faster = (means[0] / means[best]) ** (1 / len(timed))
    return Best(tried[best], by_tiles[best], faster)


@contextlib.contextmanager
def cut_as(key: TileClass, tiles: Tiles) -> Iterator[None]:
    """Calls of the class are cut so, as if it had been measured."""
    table = triton_measured.table()
    before = table.get(key)
    table[key] = tiles
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before


def layers_of(kind: str) -> list[CompressedLinearDescriptor]:
    """Those that ``kind`` is measured on."""
    weight, dtype = KINDS[kind]
    shapes = [MODELS["8b"][name] for name in LAYERS]
    return [CompressedLinearDescriptor(k, n, weight, dtype, dtype) for n, k in shapes]


def contender(
    d: CompressedLinearDescriptor, device: str, enough: int
) -> tuple[Contender, torch.Tensor]:
    """The layer with made-up weights, ``enough`` bytes of them, and the weight: fp32 [N, K]."""
    weights, method = random_weights(d, device), TritonBackend(d)
    prepared = copies_of(method.prep_weights_for_execution(weights), enough)
    exact = torch.cat([weights.dequantize(a, b) for a, b in weights.chunks()])
    return Contender(str(d), lambda x, t: method.apply(t, x), prepared), exact


def runnable(
    tried: Sequence[Tiles], start: Callable[[Tiles], Timed], say: Callable[[str], None]
) -> dict[Tiles, Timed]:
    """Those that ``start`` makes a call of. What fails is told and left out, but not the first:
    whatever the declared ones raise is raised."""
    found = {}
    for tiles in tried:
        try:
            found[tiles] = start(tiles)
        # Compilers and drivers raise what they like for what does not fit.
        except Exception as error:
            if tiles == tried[0]:
                raise
            say(f"{tiles}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    return found


def _start(
    tiles: Tiles, key: TileClass, found: Contender, exact: torch.Tensor, x: torch.Tensor
) -> Timed:
    with cut_as(key, tiles):
        check(found, exact, len(x), x.dtype)
        rotating = lambda i: found.call(x, found.copies[i % len(found.copies)])  # noqa: E731
        graph = timing.captured(rotating, CALLS_IN_GRAPH)
    return lambda number: graph.replay()


def measure(
    kind: str, platform: Platform, budget: float, say: Callable[[str], None]
) -> Mapping[TileClass, Best]:
    """Every class that ``kind`` is of, on this GPU."""
    descriptors = layers_of(kind)
    enough = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    layers = [contender(d, "cuda", enough) for d in descriptors]
    best = {}
    for up_to in launch.M_CLASSES:
        m = LARGE_M if up_to == EVERY_M else up_to
        key = launch.class_of(KernelSpec.of(descriptors[0]), m, platform.capability or 0)
        tried = candidates(launch.declared(key))
        started: list[dict[Tiles, Timed]] = []
        for d, (found, exact) in zip(descriptors, layers, strict=True):
            x = torch.randn(m, d.in_features, device="cuda").to(torch_dtype(d.input_dtype))
            start = partial(_start, key=key, found=found, exact=exact, x=x)
            started.append(runnable(tried, start, say))
            tried = list(started[-1])
        timed = [[calls[tiles] for tiles in tried] for calls in started]
        best[key] = fastest(tried, timed, budget=budget, now=timing.device_clock())
        say(f"{kind}, M up to {m}: {best[key].tiles}, {best[key].faster:.2f} times as fast")
    return best


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    found.add_argument("--budget", type=float, default=1.0, help="seconds for each layer and class")
    found.add_argument("--output", type=Path, default=triton_measured.PATH)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    kinds = options.kinds or list(KINDS)
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser().error(f"unknown kind {unknown[0]} (known: {', '.join(KINDS)})")
    if not torch.cuda.is_available():
        raise SystemExit(NO_GPU)
    torch.manual_seed(0)
    platform, console = Platform.detect("cuda"), Console()
    with torch.inference_mode():
        for kind in kinds:
            best = measure(kind, platform, options.budget, console.print)
            # After each, so that what an interrupted run has measured is kept.
            tiles = {key: found.tiles for key, found in best.items()}
            triton_measured.add(options.output, tiles, platform.gpu)
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
