# SPDX-License-Identifier: Apache-2.0
"""Memory for packed weights: one layer's after another's, in huge pages.

Layers are prepared in the order in which a model has them, which is the order in which it runs
them. So what a kernel fetches past the end of its own tensors is what the next layer begins with,
and small layers share huge pages instead of lying in 4 KiB pages of their own: on Zen 4 one row
takes 0.93 of the time with 4096 channels and 4-bit weights, and 0.8 with 1024.

Each tensor has its own storage, so it can be copied, saved and pickled by itself, and its pages go
back to the system when nothing holds it any more.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch

_HUGE_PAGE = 2 << 20
_BLOCK = 256 << 20
"""Bytes of address space taken at once; memory is taken where it is written."""
_LINE = 64


class Arena:
    """Hands out tensors that follow each other in memory. For threads of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memory: mmap.mmap | None = None
        self._next = self._end = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of any numbers, aligned to a cache line."""
        count = prod(shape)
        size = count * dtype.itemsize
        if size == 0 or not _has_huge_pages():
            return torch.empty(tuple(shape), dtype=dtype)
        with self._lock:
            memory, offset = self._take(-(-size // _LINE) * _LINE)
        own = memoryview(memory)[offset : offset + size]
        weakref.finalize(own, _give_back, memory, offset, size).atexit = False
        return torch.frombuffer(own, dtype=dtype, count=count).view(tuple(shape))

    def _take(self, size: int) -> tuple[mmap.mmap, int]:
        if self._memory is None or self._end - self._next < size:
            length = max(_BLOCK, -(-size // _HUGE_PAGE) * _HUGE_PAGE)
            self._memory = mmap.mmap(
                -1, length + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
            self._next = -address % _HUGE_PAGE
            self._end = self._next + length
            with suppress(OSError):  # a kernel without huge pages refuses, and nothing is lost
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        offset = self._next
        self._next += size
        return self._memory, offset


def _has_huge_pages() -> bool:
    return hasattr(mmap, "MADV_HUGEPAGE")


def _give_back(memory: mmap.mmap, offset: int, size: int) -> None:
    """Drops what is in the whole pages of a tensor that is gone."""
    begin = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


_of_process = Arena()


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """``Arena.empty`` of the one arena of this process."""
    return _of_process.empty(shape, dtype)
