# SPDX-License-Identifier: Apache-2.0
"""What the machine allows, measured beside every result: reading memory, multiplying.

Both with loops of ``native/``, with as many threads as torch has, and not through a library: its
matrix product may reach a third of what the core does.
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

READ_BYTES = 256 << 20
"""Bytes to read from, at least; more where the last-level cache is large."""
SLICE_BYTES = 32 << 20
"""Read at once: short enough for many samples, long enough for the clock."""
STREAMS = (1, 2, 4, 8)
AHEAD = (0, 512, 1024, 2048, 4096)
"""Bytes that are prefetched ahead of each stream."""
PRODUCT_ROUNDS = 20_000
"""Rounds of a product that are timed at once: some 0.1 ms for vectors, 1 ms for tiles."""


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
def _products() -> list[tuple[str, str]]:
    """Name and arithmetic of the loops of ``native/products.cpp`` that this machine has."""
    loaded = library("products")
    loaded.product_name.restype = loaded.product_arithmetic.restype = ctypes.c_char_p
    loaded.product_name.argtypes = loaded.product_arithmetic.argtypes = [ctypes.c_int64]
    loaded.product_run.restype = ctypes.c_int64
    loaded.product_run.argtypes = [ctypes.c_int64, ctypes.c_int64]
    found: list[tuple[str, str]] = []
    while (name := loaded.product_name(len(found))) is not None:
        found.append((name.decode(), loaded.product_arithmetic(len(found)).decode()))
    return found


def _multiply(product: int, _: int) -> int:
    return int(library("products").product_run(product, PRODUCT_ROUNDS))


def product_rates(seconds: float = 1.0) -> list[dict[str, Any]]:
    """Best rates of multiplying in each arithmetic, in 10⁹ operations a second, of all threads
    together: by vectors and, where there are any, by tiles, from registers and from L1."""
    threads, found = torch.get_num_threads(), []
    for index, (name, arithmetic) in enumerate(_products()):
        multiply = partial(_multiply, index)
        if done := multiply(0):
            share = seconds / len(_products())
            best = best_seconds(partial(in_threads, multiply, threads), share)
            rate = threads * done / best / 1e9
            found.append({"name": name, "arithmetic": arithmetic, "gop_per_s": rate})
    return found
