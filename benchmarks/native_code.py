# SPDX-License-Identifier: Apache-2.0
"""Loops of ``native/*.cpp``, built for the machine at hand, and run by several threads."""

from __future__ import annotations

import ctypes
import subprocess
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from benchmarks.families import family
from benchmarks.machine import BUILD

T = TypeVar("T")
SOURCES = Path(__file__).parent / "native"


@cache
def library(name: str) -> ctypes.CDLL:
    """``native/NAME.cpp``, built when it is first needed."""
    # The family is in the name because a build folder may be seen by unlike machines.
    source, built = SOURCES / f"{name}.cpp", BUILD / f"{name}-{family().name}.so"
    if not built.is_file() or built.stat().st_mtime < source.stat().st_mtime:
        BUILD.mkdir(parents=True, exist_ok=True)
        command = ["g++", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(built)]
        subprocess.run([*command, str(source)], check=True)
    return ctypes.CDLL(str(built))


def in_threads(action: Callable[[int], T], threads: int) -> list[T]:
    """``action`` of 0 … ``threads`` - 1, each in a thread, the first in this one; their results in
    the order in which they ended."""
    found: list[T] = []

    def run(index: int) -> None:
        found.append(action(index))

    others = [threading.Thread(target=run, args=(i,)) for i in range(1, threads)]
    for thread in others:
        thread.start()
    run(0)
    for thread in others:
        thread.join()
    return found
