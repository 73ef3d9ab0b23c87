# SPDX-License-Identifier: Apache-2.0
"""Families of processors: results of one are no evidence for another, so each has a folder.

A family is told by the numbers that CPUID (x86-64) or the main identification register (Arm) gives.
Names are those of GCC's ``-march`` where it has one. A virtual machine may hide the numbers; then
the name is made of what it does say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Family:
    """``name``: of the folder of its results. ``features``: flags of which a processor of the
    family may lack none."""

    name: str
    title: str
    features: tuple[str, ...] = ()


_AMX = ("amx_bf16", "amx_int8")
FAMILIES = {
    family.name: family
    for family in (
        Family("zen2", "AMD Zen 2"),
        Family("zen3", "AMD Zen 3"),
        Family("zen4", "AMD Zen 4", ("avx512_bf16",)),
        Family("zen5", "AMD Zen 5", ("avx512_bf16",)),
        Family("cascadelake", "Intel Skylake and Cascade Lake servers", ("avx512f",)),
        Family("icelake", "Intel Ice Lake servers", ("avx512_vnni",)),
        Family("sapphirerapids", "Intel Sapphire Rapids", _AMX),
        Family("emeraldrapids", "Intel Emerald Rapids", _AMX),
        Family("graniterapids", "Intel Granite Rapids", _AMX),
        Family("sierraforest", "Intel Sierra Forest"),
        Family("neoverse-n1", "Arm Neoverse N1"),
        Family("neoverse-v1", "Arm Neoverse V1"),
        Family("neoverse-n2", "Arm Neoverse N2"),
        Family("neoverse-v2", "Arm Neoverse V2"),
    )
}

_AMD = (
    (23, range(0x30, 0x100), "zen2"),
    (25, range(0x10), "zen3"),
    (25, range(0x10, 0x20), "zen4"),
    (25, range(0x20, 0x60), "zen3"),
    (25, range(0x60, 0xB0), "zen4"),
    (26, range(0x50), "zen5"),
    (26, range(0x60, 0x80), "zen5"),
)
_INTEL = {
    0x55: "cascadelake",
    0x6A: "icelake",
    0x6C: "icelake",
    0x8F: "sapphirerapids",
    0xCF: "emeraldrapids",
    0xAD: "graniterapids",
    0xAE: "graniterapids",
    0xAF: "sierraforest",
}
_ARM = {
    "0xd0c": "neoverse-n1",
    "0xd40": "neoverse-v1",
    "0xd49": "neoverse-n2",
    "0xd4f": "neoverse-v2",
}


def facts(text: str) -> dict[str, str]:
    """The fields of the first processor of ``/proc/cpuinfo``'s ``text``."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = (part.strip() for part in line.partition(":"))
        if colon:
            found.setdefault(name, value)
    return found


def family_of(cpu: Mapping[str, str]) -> Family:
    """The family of a processor with these ``facts``."""
    known = FAMILIES.get(_name(cpu))
    if known is not None and {*known.features} <= {*cpu.get("flags", "").split()}:
        return known
    vendor = cpu.get("vendor_id") or cpu.get("CPU implementer", "unknown")
    numbers = (cpu.get("cpu family", ""), cpu.get("model", ""), cpu.get("CPU part", ""))
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, (vendor, *numbers))).lower())
    return Family(name, f"{cpu.get('model name', vendor)} ({name})")


def _name(cpu: Mapping[str, str]) -> str:
    if (part := cpu.get("CPU part")) is not None:
        return _ARM.get(part, "")
    try:
        family, model = int(cpu["cpu family"]), int(cpu["model"])
    except (KeyError, ValueError):
        return ""
    if cpu.get("vendor_id") == "GenuineIntel" and family == 6:
        return _INTEL.get(model, "")
    if cpu.get("vendor_id") == "AuthenticAMD":
        return next((n for f, models, n in _AMD if f == family and model in models), "")
    return ""


def _here() -> dict[str, str]:
    return facts(CPUINFO.read_text()) if CPUINFO.is_file() else {}


def family() -> Family:
    """The family of this machine's processor."""
    return family_of(_here())


def vendor() -> str:
    """Who made this machine's processor, as CPUID says it; empty if it does not."""
    return _here().get("vendor_id", "")


def title_of(name: str) -> str:
    """What to call the family with the folder ``name``."""
    known = FAMILIES.get(name)
    return name if known is None else known.title


def unmeasured(measured: Iterable[str]) -> list[Family]:
    """The known families that are not among the names ``measured``."""
    seen = set(measured)
    return [found for found in FAMILIES.values() if found.name not in seen]
