# SPDX-License-Identifier: Apache-2.0
"""Memory of the host that this process can still allocate."""

from __future__ import annotations

import sys
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes available to this process: of the host, or of its control group if that has less.

    File pages that the kernel can drop count as available. ``sys.maxsize`` where the system does
    not tell.
    """
    try:
        lines = MEMINFO.read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        free = sys.maxsize
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return free
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return min(free, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # the first version of control groups, or none
        return free
