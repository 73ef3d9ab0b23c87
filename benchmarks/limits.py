# SPDX-License-Identifier: Apache-2.0
"""What the machine allows, measured with every result: reading memory, multiplying.

Both with loops of our own, with as many threads as torch has, and not through a matrix product of a
library, which may reach a third of what the core does.
"""

from __future__ import annotations

import ctypes
import itertools
import statistics
import time
from functools import cache, partial
from typing import Any

import torch

from benchmarks.machine import available_bytes, cache_bytes
from benchmarks.native_code import in_threads, library
from benchmarks.rotation import MEMORY_SHARE
from benchmarks.timing import best_seconds, timed
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.profiles import INSTRUCTIONS

READ_BYTES = 256 << 20
"""Bytes to read from, at least; more where the last-level cache is large."""
SLICE_BYTES = 32 << 20
"""Read at once: short enough for many samples, long enough for the clock."""
STREAMS = (1, 2, 4, 8)
AHEAD = (0, 512, 1024, 2048, 4096)
"""Bytes that are prefetched ahead of each stream."""
TILES = ("bf16", "int8")
TILE_ROUNDS = 20_000
"""Rounds of four products of tiles that are timed at once, some 0.5 ms."""


@cache
def _reader() -> ctypes.CDLL:
    loaded = library("read")
    loaded.reader_allocate.restype = ctypes.c_void_p
    loaded.reader_allocate.argtypes = [ctypes.c_int64]
    loaded.reader_read.restype = ctypes.c_int64
    loaded.reader_read.argtypes = [ctypes.c_void_p, *(ctypes.c_int64,) * 3]
    return loaded


@cache
def _memory(size: int) -> int:
    address = _reader().reader_allocate(size)
    if not address:
        raise MemoryError(f"no {size >> 20} MiB to read from")
    return int(address)


@cache
def _read_bytes(cache: int) -> int:
    """Bytes to read from for a last-level cache of ``cache`` bytes, whole slices."""
    wanted = min(max(4 * cache, READ_BYTES), available_bytes() // MEMORY_SHARE)
    return max(wanted // SLICE_BYTES, 1) * SLICE_BYTES


def _read_part(base: int, size: int, streams: int, ahead: int, index: int) -> None:
    _reader().reader_read(base + index * size, size, streams, ahead)


def read_rate(seconds: float = 2.0) -> dict[str, Any]:
    """Rates of reading memory beyond the caches in GB/s: the best one and how it was reached, the
    best of each number of streams, and the quartiles' distance of the best way, of its median.

    Ways take turns and each turn reads the next slice, so that all see the same disturbances and
    none finds its slice in the cache.
    """
    size, threads = _read_bytes(cache_bytes()), torch.get_num_threads()
    base, part = _memory(size), SLICE_BYTES // threads // 128 * 128
    ways = list(itertools.product(STREAMS, AHEAD))
    times: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    end, at = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or len(times[ways[-1]]) < 3:
        for streams, ahead in ways:
            read = partial(_read_part, base + at, part, streams, ahead)
            times[streams, ahead].append(timed(partial(in_threads, read, threads)).counted)
            at = (at + SLICE_BYTES) % size
    rates = {way: threads * part / min(seen) / 1e9 for way, seen in times.items()}
    best = max(rates, key=lambda way: rates[way])
    low, median, high = statistics.quantiles(times[best], n=4)
    return {
        "read_gb_per_s": rates[best],
        "read_streams": best[0],
        "read_ahead_bytes": best[1],
        "read_median_gb_per_s": threads * part / median / 1e9,
        "read_spread": (high - low) / median,
        "read_gb_per_s_by_streams": {
            str(streams): max(rates[streams, ahead] for ahead in AHEAD) for streams in STREAMS
        },
    }


@cache
def _tiles() -> ctypes.CDLL:
    loaded = library("tiles")
    for arithmetic in TILES:
        loop = getattr(loaded, f"tiles_{arithmetic}")
        loop.restype, loop.argtypes = ctypes.c_int64, [ctypes.c_int64]
    return loaded


def _instruction_rates() -> dict[str, float]:
    """10⁹ operations a second of each instruction of ``profiles.INSTRUCTIONS`` that multiplies,
    from registers, of the calling thread."""
    native.load()
    lines = torch.ops.compressed_linear.measure_rates().splitlines()
    per_cycle = {name: float(value) for name, value in (line.split() for line in lines)}
    clock = per_cycle.pop("clock")
    return {
        name: rate * clock * INSTRUCTIONS[name].operations / 1e9
        for name, rate in per_cycle.items()
        if INSTRUCTIONS[name].arithmetic
    }


def _multiply_tiles(arithmetic: str, _: int) -> int:
    return int(getattr(_tiles(), f"tiles_{arithmetic}")(TILE_ROUNDS))


def product_rates(seconds: float = 1.0) -> list[dict[str, Any]]:
    """Best rates of multiplying in each arithmetic, in 10⁹ operations a second, of all threads
    together: by each instruction from registers and, where there are tiles, from L1."""
    threads = torch.get_num_threads()
    best: dict[str, float] = {}
    end = time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        taken = in_threads(lambda _: _instruction_rates(), threads)
        for name in taken[0]:
            best[name] = max(best.get(name, 0.0), sum(rates[name] for rates in taken))
    found = [
        {"name": name, "arithmetic": INSTRUCTIONS[name].arithmetic, "gop_per_s": rate}
        for name, rate in best.items()
    ]
    for arithmetic in TILES:
        multiply_once = partial(_multiply_tiles, arithmetic)
        if done := multiply_once(0):
            multiply = partial(in_threads, multiply_once, threads)
            rate = threads * done / best_seconds(multiply, seconds / 4) / 1e9
            name = f"tile_{arithmetic} from L1"
            found.append({"name": name, "arithmetic": arithmetic, "gop_per_s": rate})
    return found
