# SPDX-License-Identifier: Apache-2.0
"""Instruction sets of the compiled kernels: the rows of ``csrc/cpu/common/isa.cpp``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class CpuIsa:
    """``features``: required CPU features, as in ``Platform.features``; ``floats`` and
    ``integers``: which kinds of kernels it has; ``machine``: the processor's architecture, empty
    for all."""

    name: str
    features: frozenset[str]
    floats: bool = True
    integers: bool = True
    machine: str = "x86_64"

    def has(self, kernels: str) -> bool:
        """Whether it has kernels of the kind "floats" or "integers"."""
        return self.floats if kernels == "floats" else self.integers


AVX2 = frozenset({"avx2"})
AVX512 = AVX2 | {"avx512"}
AVX512_VNNI = AVX512 | {"avx512_vnni"}
AVX512_BF16 = AVX512_VNNI | {"avx512_bf16"}
AMX = AVX512_BF16 | {"amx"}

ISAS = (
    CpuIsa("generic", frozenset(), machine=""),
    CpuIsa("avx2", AVX2),
    CpuIsa("avx2madd", AVX2, integers=False),
    CpuIsa("avx512", AVX512),
    CpuIsa("avxvnni", AVX2 | {"avxvnni"}),
    CpuIsa("avx512vnni", AVX512_VNNI),
    CpuIsa("avx512bf16", AVX512 | {"avx512_bf16"}, integers=False),
    CpuIsa("amx", AMX),
    CpuIsa("neon", frozenset({"neon"}), machine="aarch64"),
    CpuIsa("dotprod", frozenset({"neon", "dotprod"}), floats=False, machine="aarch64"),
    CpuIsa("i8mm", frozenset({"neon", "i8mm"}), floats=False, machine="aarch64"),
)
"""For each architecture from the least to the most capable."""


def runnable(machine: str, features: Collection[str], kernels: str) -> list[str]:
    """Instruction sets with such kernels on a processor with ``features``."""
    return [
        isa.name
        for isa in ISAS
        if isa.machine in ("", machine) and isa.features <= set(features) and isa.has(kernels)
    ]


def features_of(names: Collection[str]) -> frozenset[str]:
    """Features of a processor that runs the instruction sets ``names``."""
    return frozenset().union(*(isa.features for isa in ISAS if isa.name in names))
