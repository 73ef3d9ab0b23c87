# SPDX-License-Identifier: Apache-2.0
"""Processors by name: how often a cycle they execute the instructions that kernels live on.

A feature flag says that an instruction exists, not that it is fast: bf16 dot products of 512 bits
run 0.94 times a cycle on Zen 4 and 0.5 times on Intel's Xeons, where fp32 FMA is twice as fast.
Each rate says where it comes from:

* measured: by ``csrc/cpu/rates/rates.cpp`` or its predecessors on such a processor
* published: by its vendor, or by uops.info (Abel and Reineke, ASPLOS 2019)
* estimated: from the width of its units, or taken from a sister core
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vllm.compressed_linear.machine.isas import AMX, AVX2, AVX512, AVX512_BF16, AVX512_VNNI
from vllm.compressed_linear.machine.limits import MachineLimits

Source = Literal["measured", "published", "estimated"]
SOURCES: tuple[Source, ...] = ("measured", "published", "estimated")


@dataclass(frozen=True)
class Instruction:
    """``operations``: multiplications and additions of one, in ``arithmetic`` (empty: neither).
    ``features``: of the processors that have it, as in ``Platform.features``."""

    name: str
    features: frozenset[str]
    arithmetic: str = ""
    operations: int = 0


INSTRUCTIONS = {
    instruction.name: instruction
    for instruction in (
        Instruction("scalar", frozenset(), "fp32", 2),
        Instruction("fma256", AVX2, "fp32", 16),
        Instruction("madd256", AVX2, "int8", 64),
        Instruction("lookup256", AVX2),
        Instruction("dot8_256", AVX2 | {"avxvnni"}, "int8", 64),
        Instruction("fma512", AVX512, "fp32", 32),
        Instruction("madd512", AVX512, "int8", 128),
        Instruction("lookup512", AVX512),
        Instruction("dotbf16_512", AVX512 | {"avx512_bf16"}, "bf16", 64),
        Instruction("dot8_512", AVX512_VNNI, "int8", 128),
        Instruction("tile_bf16", AMX, "bf16", 2 * 16 * 16 * 32),
        Instruction("tile_int8", AMX, "int8", 2 * 16 * 16 * 64),
        Instruction("fma128", frozenset({"neon"}), "fp32", 8),
        Instruction("madd128", frozenset({"neon"}), "int8", 32),
        Instruction("lookup128", frozenset({"neon"})),
        Instruction("dot8_128", frozenset({"neon", "dotprod"}), "int8", 32),
        Instruction("mmla128", frozenset({"neon", "i8mm"}), "int8", 64),
    )
}
"""What rates are known by: fma: fp32 multiply-add; lookup: permutation of a register by another;
dotbf16: ``vdpbf16ps``; dot8: byte dot products, ``vpdpbusd`` or ``sdot``; madd: the same work by
``vpmaddubsw``, ``vpmaddwd`` and an addition, or by ``smull`` and ``sadalp``, which count as one;
mmla: ``smmla``; tile: a product of two full tile registers. The number is the width in bits."""


@dataclass(frozen=True)
class Rate:
    """Instructions a cycle of one core."""

    value: float
    source: Source


@dataclass(frozen=True)
class Profile:
    """One processor. ``clock``: cycles a second under such load; ``read``: bytes a second that one
    core reads from memory. ``known_as``: ends of ``limits.cpu_name`` of such processors.
    ``changed``: the rates that were measured here and are not those of the processor's kind.
    ``origin``: where this machine's profile comes from, empty for a processor by name."""

    name: str
    features: frozenset[str]
    clock: float
    read: float
    rates: tuple[tuple[str, Rate], ...]
    machine: str = "x86_64"
    known_as: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    origin: str = ""
    by_name: dict[str, float] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.by_name.update((name, rate.value) for name, rate in self.rates)

    def rate(self, name: str) -> float:
        """Instructions a cycle; 0 if it has none of that name."""
        return self.by_name.get(name, 0.0)

    def core(self, features: frozenset[str]) -> MachineLimits:
        """Peak rates of one core of which programs may use ``features``. What has no arithmetic of
        its own is done in fp32."""
        best = {"fp32": 0.0, "bf16": 0.0, "int8": 0.0}
        for name, rate in self.rates:
            instruction = INSTRUCTIONS[name]
            if instruction.arithmetic and instruction.features <= features:
                reached = instruction.operations * rate.value * self.clock
                best[instruction.arithmetic] = max(best[instruction.arithmetic], reached)
        fp32 = best["fp32"]
        return MachineLimits(self.read, fp32, max(best["bf16"], fp32), max(best["int8"], fp32))

    def to_json(self) -> dict[str, Any]:
        """Plain values for the plan: where it comes from, and the instructions a cycle."""
        return {
            "name": self.name,
            "origin": self.origin,
            "clock": self.clock,
            "rates": {name: float(f"{rate.value:.3g}") for name, rate in self.rates},
            "changed": list(self.changed),
        }

    def with_rates(self, rates: dict[str, Rate]) -> Profile:
        """This profile with some rates replaced."""
        changed = tuple(name for name, _ in self.rates if name in rates)
        merged = tuple((name, rates.get(name, rate)) for name, rate in self.rates)
        return replace(self, rates=merged, changed=changed, by_name={})


def _profile(
    name: str,
    features: frozenset[str],
    clock: float,
    read: float,
    *,
    machine: str = "x86_64",
    known_as: tuple[str, ...] = (),
    measured: dict[str, float] | None = None,
    published: dict[str, float] | None = None,
    estimated: dict[str, float] | None = None,
) -> Profile:
    groups = zip(SOURCES, (measured, published, estimated), strict=True)
    found = {n: Rate(v, source) for source, group in groups for n, v in (group or {}).items()}
    rates = tuple((n, found[n]) for n in INSTRUCTIONS if n in found)
    return Profile(name, features, clock, read, rates, machine, known_as)


def _models(family: int, *models: int) -> tuple[str, ...]:
    return tuple(f"cpu family {family}, model {model}" for model in models)


_SCALAR = {"scalar": 3.0}
"""What compilers make of plain C++, with the four lanes that every x86-64 has."""
_AVX2 = {"fma256": 2.0, "madd256": 0.75, "lookup256": 2.0}
_INTEL_AMX = (
    _SCALAR
    | {"fma256": 2.0, "madd256": 0.9, "lookup256": 2.0, "dot8_256": 2.0, "madd512": 0.67}
    | {"fma512": 2.0, "lookup512": 1.0, "dotbf16_512": 0.5, "dot8_512": 2.0}
    | {"tile_bf16": 1 / 16, "tile_int8": 1 / 16}
)
"""Golden Cove and its successors, whose vector units are alike."""

_FEATURES_AMX = AMX | {"avxvnni"}

PROFILES = {
    profile.name: profile
    for profile in (
        _profile("generic", frozenset(), 3.3e9, 15e9, estimated=_SCALAR),
        _profile("avx2", AVX2, 2.9e9, 25e9, estimated=_SCALAR | _AVX2),
        _profile(
            "avx512",
            AVX512,
            3.6e9,
            30e9,
            estimated=_SCALAR | _AVX2 | {"fma512": 1.0, "madd512": 0.5, "lookup512": 1.0},
        ),
        _profile(
            "avx512bf16",
            AVX512_BF16,
            3.6e9,
            30e9,
            estimated=_SCALAR
            | _AVX2
            | {"fma512": 1.0, "madd512": 0.5, "lookup512": 1.0}
            | {"dotbf16_512": 1.0, "dot8_512": 1.0},
        ),
        _profile(
            "amx",
            AMX,
            3.0e9,
            15e9,
            estimated={n: r for n, r in _INTEL_AMX.items() if n != "dot8_256"},
        ),
        _profile(
            "aarch64",
            frozenset({"neon"}),
            2.8e9,
            25e9,
            machine="aarch64",
            estimated={"scalar": 2.0, "fma128": 2.0, "madd128": 1.0, "lookup128": 2.0},
        ),
        _profile(
            "icelake",
            AVX512_VNNI,
            2.9e9,
            12e9,
            known_as=_models(6, 106, 108),
            published={"fma256": 2.0, "lookup256": 2.0, "fma512": 2.0, "lookup512": 1.0}
            | {"dot8_512": 1.0},
            estimated=_SCALAR | {"madd256": 0.66, "madd512": 0.5},
        ),
        _profile(
            "sapphirerapids",
            _FEATURES_AMX,
            3.0e9,
            12e9,
            known_as=_models(6, 143),
            estimated=_INTEL_AMX,
        ),
        _profile(
            "emeraldrapids",
            _FEATURES_AMX,
            3.0e9,
            12.5e9,
            known_as=_models(6, 207),
            measured={n: r for n, r in _INTEL_AMX.items() if n not in _SCALAR},
            estimated=_SCALAR,
        ),
        _profile(
            "graniterapids",
            _FEATURES_AMX,
            3.2e9,
            14e9,
            known_as=_models(6, 173, 174),
            estimated=_INTEL_AMX,
        ),
        _profile(
            "zen3",
            AVX2,
            3.4e9,
            25e9,
            known_as=_models(25, 1, 8, 33, 80),
            published={"fma256": 2.0, "lookup256": 2.0},
            estimated=_SCALAR | {"madd256": 0.66},
        ),
        _profile(
            "zen4",
            AVX512_BF16,
            3.66e9,
            34e9,
            known_as=_models(25, 17, 24, 97, 116, 117, 160),
            measured={"fma512": 1.0, "dotbf16_512": 0.94, "dot8_512": 0.94},
            published={"fma256": 2.0, "lookup256": 2.0, "lookup512": 1.0},
            estimated=_SCALAR | {"madd256": 0.66, "madd512": 0.33},
        ),
        _profile(
            "zen5",
            AVX512_BF16 | {"avxvnni"},
            4.0e9,
            35e9,
            known_as=_models(26, 2, 17, 36, 68),
            measured={"dotbf16_512": 1.75},
            published={"fma256": 2.0, "lookup256": 2.0, "dot8_256": 2.0, "fma512": 2.0}
            | {"dot8_512": 2.0, "lookup512": 2.0},
            estimated=_SCALAR | {"madd256": 0.66, "madd512": 0.66},
        ),
        _profile(
            "neoverse-v2",
            frozenset({"neon", "dotprod", "i8mm"}),
            3.1e9,
            30e9,
            machine="aarch64",
            known_as=("0xd4f",),
            published={"fma128": 4.0, "lookup128": 2.0, "dot8_128": 4.0, "mmla128": 4.0},
            estimated={"scalar": 2.0, "madd128": 2.0},
        ),
    )
}
"""By name. Those named after an instruction set stand for any processor with no more than it:
``Platform.parse`` accepts each name after ``cpu:``."""


def plain_profile(machine: str, features: frozenset[str]) -> Profile:
    """The last profile that is named after an instruction set and needs no other features."""
    plain = ("generic", "avx2", "avx512", "avx512bf16", "amx", "aarch64")
    able = [PROFILES[name] for name in plain]
    fit = [p for p in able if p.features <= features and p.machine == machine]
    return fit[-1] if fit else PROFILES["generic"]
