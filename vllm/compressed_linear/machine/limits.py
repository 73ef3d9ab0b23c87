# SPDX-License-Identifier: Apache-2.0
"""Name, cache size and peak rates of a processor.

The declared rates are for machines without measurements; ``vllm-compressed-linear tune`` measures
those of this machine and stores them in its file.
"""

from __future__ import annotations

import platform as _host
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CPUS = Path("/sys/devices/system/cpu")
UNKNOWN_CACHE_BYTES = 32 << 20


ARITHMETIC = ("fp32", "bf16", "int8", "fp8", "fp4", "mma")


@dataclass(frozen=True)
class MachineLimits:
    """Peak rates of all threads in use together: bytes read from memory per second, and operations
    (multiplications and additions, so 2·M·N·K for a matrix product) per second by data type; 0 if
    the machine has no arithmetic of that type. "bf16" is fp16 as well. ``launch``: seconds to start
    a kernel on an accelerator. ``mma``: share of the bf16 rate that kernels reach with
    ``mma.sync``, the instruction of GPUs before Hopper."""

    read: float
    fp32: float
    bf16: float
    int8: float
    fp8: float = 0.0
    fp4: float = 0.0
    launch: float = 0.0
    mma: float = 1.0

    def operations(self, arithmetic: str) -> float:
        """Operations per second in one of ``ARITHMETIC``; "mma" is bf16 by ``mma.sync``. Raises
        ``ValueError`` for an unknown name and for one that the machine does not have."""
        if arithmetic not in ARITHMETIC:
            known = ", ".join(ARITHMETIC)
            raise ValueError(f"unknown arithmetic {arithmetic!r} (known: {known})")
        if arithmetic == "mma":
            return self.bf16 * self.mma
        rate = float(getattr(self, arithmetic))
        if not rate:
            raise ValueError(f"this machine has no {arithmetic} arithmetic")
        return rate


_SOCKET_READ = 250e9
"""More cores do not read faster than this."""

ACCELERATOR = MachineLimits(1e12, 50e12, 200e12, 400e12, launch=5e-6)
"""Fallback limits for unknown accelerators. See ``gpus.py`` for NVIDIA."""


def limits_of_cores(core: MachineLimits, threads: int) -> MachineLimits:
    """Limits of ``threads`` cores with the limits ``core`` each."""
    return MachineLimits(
        min(core.read * threads, max(core.read, _SOCKET_READ)),
        core.fp32 * threads,
        core.bf16 * threads,
        core.int8 * threads,
    )


@cache
def cpu_name() -> str:
    """Name of this processor, with the numbers of its family and model if it has any: virtual
    machines give several generations the same name."""
    found: dict[str, str] = {}
    if CPUINFO.is_file():
        for line in CPUINFO.read_text().splitlines():
            name, _, value = (part.strip() for part in line.partition(":"))
            found.setdefault(name, value)
    if "model name" not in found:
        return found.get("CPU part") or _host.processor() or _host.machine()
    numbers = [f"{name} {found[name]}" for name in ("cpu family", "model") if name in found]
    return ", ".join([found["model name"], *numbers])


@cache
def cache_bytes(threads: int) -> int:
    """Bytes of the last-level caches (which cores may share) of ``threads`` cores; 32 MiB if the
    system does not say."""
    caches: dict[tuple[int, str], int] = {}
    for index in CPUS.glob("cpu[0-9]*/cache/index*"):
        try:
            level, shared, size = (
                (index / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
        except OSError:
            continue
        if size.endswith("K") and size[:-1].isdigit():
            caches[int(level), shared] = int(size[:-1]) << 10
    last = max((level for level, _ in caches), default=0)
    sizes = sorted((size for (level, _), size in caches.items() if level == last), reverse=True)
    return sum(sizes[:threads]) or UNKNOWN_CACHE_BYTES
