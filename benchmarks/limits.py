# SPDX-License-Identifier: Apache-2.0
"""What the machine allows, measured beside every result: reading memory, multiplying matrices."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.machine import BUILD, cache_bytes
from benchmarks.timing import best_seconds

SOURCE = Path(__file__).parent / "native" / "read.cpp"
READ_BYTES = 256 << 20
STREAMS = (1, 2, 4, 8)
AHEAD = (0, 512, 1024, 2048, 4096)
"""Bytes that are prefetched ahead of each stream."""
GEMM_SIZES = ((256, 4096, 4096), (512, 2048, 2048), (1024, 1024, 1024), (2048, 2048, 2048))
"""(M, N, K) of the matrix products whose best rate is the limit of all."""


@cache
def _reader() -> ctypes.CDLL:
    """The reader of ``native/read.cpp``, built for this machine when it is first needed."""
    library = BUILD / "read.so"
    if not library.is_file() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        command = ["g++", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library)]
        subprocess.run([*command, str(SOURCE)], check=True)
    loaded = ctypes.CDLL(str(library))
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


def _read_all(size: int, streams: int, ahead: int) -> None:
    """Reads ``size`` bytes with as many threads as torch has, each its own part."""
    reader, base, threads = _reader(), _memory(size), torch.get_num_threads()
    part = size // threads

    def read(index: int) -> None:
        reader.reader_read(base + index * part, part, streams, ahead)

    others = [threading.Thread(target=read, args=(i,)) for i in range(1, threads)]
    for thread in others:
        thread.start()
    read(0)
    for thread in others:
        thread.join()


def read_rate(seconds: float = 2.0) -> dict[str, float]:
    """Best rate of reading memory beyond the caches, in GB/s, and how it was reached."""
    size = max(4 * cache_bytes(), READ_BYTES)
    ways = list(itertools.product(STREAMS, AHEAD))
    share = seconds / len(ways)
    times = {way: best_seconds(partial(_read_all, size, *way), share) for way in ways}
    best = min(times, key=lambda way: times[way])
    return {
        "read_gb_per_s": size / times[best] / 1e9,
        "read_streams": best[0],
        "read_ahead_bytes": best[1],
    }


def _best_gemm(product: Callable[[int, int, int], Callable[[], object]], seconds: float) -> float:
    share = seconds / len(GEMM_SIZES)
    rates = (
        2.0 * m * n * k / best_seconds(product(m, n, k), share) / 1e9 for m, n, k in GEMM_SIZES
    )
    return max(rates)


def _bf16_product(m: int, n: int, k: int) -> Callable[[], object]:
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    return lambda: F.linear(a, b)


def _int8_product(m: int, n: int, k: int) -> Callable[[], object]:
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8).t()
    return lambda: torch._int_mm(a, b)


def gemm_rates(seconds: float = 3.0) -> dict[str, float]:
    """Best rates of multiplying matrices, over several sizes: oneDNN through torch."""
    return {
        "bf16_gemm_gflop_per_s": _best_gemm(_bf16_product, seconds / 2),
        "int8_gemm_gop_per_s": _best_gemm(_int8_product, seconds / 2),
    }
