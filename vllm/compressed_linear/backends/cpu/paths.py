# SPDX-License-Identifier: Apache-2.0
"""Which instruction set multiplies how many tokens M.

All kernels of one kind read one packed layout, so each call takes the instruction set that is
fastest for its M. That follows from the rates of the processor (``machine/profiles.py``) and the
declared costs of the kernels. The compiled library holds the table of this process.

Sums of floats depend on the instruction set, so with more than one the bits of a row depend on the
batch; ``VLLM_BATCH_INVARIANT=1`` keeps one for every M. Integer kernels give the same bits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import lru_cache

from vllm.compressed_linear.backends.cpu.costs import (
    CALL_CLASSES,
    COSTS,
    CallClass,
    KernelCost,
    can_multiply,
)
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.cost import MIX
from vllm.compressed_linear.machine.isas import runnable
from vllm.compressed_linear.machine.limits import cpu_name
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.machine.profiles import Profile
from vllm.compressed_linear.settings import CPU_ISA, batch_invariant

Paths = tuple[tuple[int | None, str], ...]
"""(Largest M, instruction set) in ascending order; None in the last one, which takes the rest."""

_WEIGHTS = 4096.0 * 4096.0
"""Weights of the layer for which paths are computed. Its size hardly matters."""
_BYTES = {"narrow": 0.53, "bytes": 1.0, "bf16": 2.0, "wide": 2.0, "int": 0.53, "int8": 1.0}
_LARGEST_M = 512
_MOST_PATHS = 4


def paths_of(call: CallClass, platform: Platform) -> Paths:
    """The paths of ``call`` on ``platform``: as the library has them in this process, if it is this
    machine, else as it would have them there."""
    forced = os.environ.get(CPU_ISA)
    if platform.cpu and platform.cpu == cpu_name() and native.available() is None:
        install(platform)
        try:
            return _installed(native.paths())[str(call)]
        except ValueError:  # what is forced does not run here: the first call reports it
            return ((None, str(forced)),)
    if forced and forced in COSTS[call.kernels]:
        return ((None, forced),)
    return _computed(call, platform.rates, platform.machine, platform.features, batch_invariant())


def path_at(paths: Paths, m: int) -> str:
    """The instruction set that multiplies ``m`` tokens."""
    return next(isa for largest, isa in paths if largest is None or m <= largest)


def in_words(paths: Paths) -> str:
    """``avx512 to M=8, amx``."""
    return ", ".join(isa if largest is None else f"{isa} to M={largest}" for largest, isa in paths)


def cost_of(isa: str, call: CallClass) -> KernelCost:
    """The costs of the kernels that ``isa`` runs ``call`` with."""
    costs = COSTS[call.kernels]
    if can_multiply(isa, call):
        return costs[isa]
    return costs[_OTHERS.get(isa, "generic")]


_OTHERS = {
    **dict.fromkeys(("avx512vnni", "avx512bf16", "amx"), "avx512"),
    **dict.fromkeys(("avx2madd", "avxvnni"), "avx2"),
}
"""What multiplies calls that an instruction set hands on."""


def install_here() -> None:
    """``install`` for this machine, where the library was built."""
    if native.available() is None:
        install(Platform.detect())


_INSTALLED: list[tuple[Profile, bool]] = []
_LOCK = threading.Lock()


def install(platform: Platform) -> None:
    """Give the compiled library the paths of ``platform``, which is this machine. Idempotent.

    Calls that begin afterwards take them, in all threads of the process.
    """
    wanted = (platform.rates, batch_invariant())
    with _LOCK:
        if [wanted] == _INSTALLED:
            return
        machine, features = platform.machine, platform.features
        table = {
            str(call): _computed(call, platform.rates, machine, features, wanted[1])
            for call in CALL_CLASSES
        }
        native.select_paths("\n".join(f"{name} {_line(paths)}" for name, paths in table.items()))
        _INSTALLED[:] = [wanted]


def _line(paths: Paths) -> str:
    return " ".join(isa if largest is None else f"{isa} {largest}" for largest, isa in paths)


@lru_cache(maxsize=16)
def _installed(text: str) -> Mapping[str, Paths]:
    """The library's table, by name of a class."""
    found: dict[str, Paths] = {}
    for line in text.splitlines():
        name, *words = line.split()
        isas, numbers = words[::2], [int(word) for word in words[1::2]]
        found[name] = tuple(zip([*numbers, None], isas, strict=True))
    return found


@lru_cache(maxsize=1024)
def _computed(
    call: CallClass, profile: Profile, machine: str, features: frozenset[str], same: bool
) -> Paths:
    """The fastest for each M; for all of the mix together if floats are to have the ``same``."""
    able = [isa for isa in runnable(machine, features, call.kernels) if can_multiply(isa, call)]
    if "avx512vnni" in able:
        # The same with half as wide registers, and three instructions for each dot product: NVFP4
        # takes 0.76 instead of 0.33 ms (4096x4096, Zen 4), which rates of single instructions hide.
        able = [isa for isa in able if isa != "avx2madd"]

    def seconds(isa: str, m: int) -> tuple[float, float]:
        compute = COSTS[call.kernels][isa].cycles(call, profile, m, _WEIGHTS) / profile.clock
        return max(_BYTES[call.weights] * _WEIGHTS / profile.read, compute), compute

    # Later ones are more capable, and taken where all only wait for memory in the same way.
    order = able[::-1]
    if same and call.kernels == "floats":
        best = min(
            order, key=lambda isa: sum(share * seconds(isa, m)[0] for m, share in MIX.items())
        )
        return ((None, best),)
    taken: list[tuple[int | None, str]] = []
    for m in range(1, _LARGEST_M + 1):
        isa = min(order, key=lambda isa: seconds(isa, m))
        if taken and taken[-1][1] == isa:
            taken[-1] = (m, isa)
        else:
            taken.append((m, isa))
    taken = taken[-_MOST_PATHS:]
    taken[-1] = (None, taken[-1][1])
    return tuple(taken)
