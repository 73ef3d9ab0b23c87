# SPDX-License-Identifier: Apache-2.0
"""Declared costs of the CPU kernels: what a call takes by the rates of the processor.

Cycles are counted for one core: those of decoding, and those of multiplying at the rate of the
instruction that does it. The numbers were measured on Zen 4 (``avx512bf16``, ``avx512``,
``avx512vnni``, ``avx2madd``), Zen 3 (``avx2``) and Emerald Rapids (``amx``, ``avx512``); those for
Arm and for ``avxvnni`` are guesses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vllm.compressed_linear.machine.profiles import Profile

Kernels = Literal["floats", "integers"]
CODES_PER_BLOCK = 64


@dataclass(frozen=True)
class KernelCost:
    """Kernels of one instruction set.

    ``instruction``: that multiplies, by its name in ``machine/profiles.py``; ``products``:
    multiplications of one; ``efficiency``: share of its rate that the kernels reach, ``grouped``
    with scales of x for groups of channels; ``floor``: the fewest cycles from one to the next,
    since operands are loaded for each. ``rows``: the fewest tokens that a call is charged for.
    ``decode``: kind of weights → cycles that 64 of them take once in a call, if the ``lookup``
    instruction runs once a cycle. ``parts``: dtype of x → terms of bf16, or digits, that it is
    split into, others not being multiplied; None: multiplied in fp32, whatever it is. ``narrow``:
    speed-up of products with codes below 8 bits, two of which fit 16 bits, so that they need not be
    widened. ``digits``: multiplies what has digits of x, of the kinds in ``decode``, and nothing
    else.
    """

    instruction: str
    products: int
    efficiency: float
    decode: Mapping[str, float]
    lookup: str = ""
    floor: float = 0.0
    rows: int = 1
    parts: Mapping[str, int] | None = None
    grouped: float = 0.0
    narrow: float = 1.0
    digits: bool = False

    def cycles(self, call: CallClass, profile: Profile, m: int, weights: float) -> float:
        """Of one core for ``m`` tokens and so many ``weights``; infinite where the profile has no
        rate of the instruction, as for an instruction set that is forced for another processor."""
        if not (rate := profile.rate(self.instruction)):
            return math.inf
        slower = 1.0 / (profile.rate(self.lookup) or 1.0) if self.lookup else 1.0
        decode = self.decode.get(call.decoded, 0.0) * slower * weights / CODES_PER_BLOCK
        efficiency = self.grouped if call.x == "group" else self.efficiency
        if call.weights == "narrow":
            efficiency *= self.narrow
        each = max(1.0 / (rate * efficiency), self.floor)
        rows = max(m, self.rows)
        parts = 1 if self.parts is None else self.parts[call.x]
        return decode + each * parts * rows * weights / self.products


@dataclass(frozen=True)
class CallClass:
    """Calls that take one path for each M, as in ``csrc/cpu/common/paths.h``. ``weights``:
    "narrow" (codes below 8 bits), "bytes", "bf16" or "wide" (what bf16 does not hold), "int" and
    "int8" (those of narrow and bytes that can be multiplied with digits of x); ``x``: the dtype
    that holds x, or for integers what has a scale of x, "token" or "group"."""

    kernels: Kernels
    weights: str
    x: str

    def __str__(self) -> str:
        return f"{self.kernels}/{self.weights}/{self.x}"

    @property
    def decoded(self) -> str:
        """Kind of weights for kernels that decode them."""
        return {"int": "narrow", "int8": "bytes"}.get(self.weights, self.weights)


CALL_CLASSES = (
    *(
        CallClass("floats", weights, x)
        for weights in ("narrow", "bytes", "bf16", "wide", "int", "int8")
        for x in ("bfloat16", "float16", "float32")
    ),
    *(
        CallClass("integers", weights, x)
        for weights in ("narrow", "bytes")
        for x in ("token", "group")
    ),
)

_PAIRS = {"bfloat16": 1, "float16": 2}
_TILES = {"bfloat16": 1, "float16": 2, "float32": 3}
_DIGITS = {"bfloat16": 3, "float16": 3, "float32": 3}

COSTS: dict[Kernels, dict[str, KernelCost]] = {
    "floats": {
        "generic": KernelCost("scalar", 1, 0.05, {"narrow": 190.0, "bytes": 190.0}),
        "avx2": KernelCost(
            "fma256",
            8,
            0.88,
            {"narrow": 12.0, "bytes": 22.0, "bf16": 25.0},
            "lookup256",
            floor=0.65,
        ),
        "avx512": KernelCost(
            "fma512",
            16,
            0.9,
            {"narrow": 4.7, "bytes": 8.7, "bf16": 12.0},
            "lookup512",
            floor=0.95,
        ),
        "avx512bf16": KernelCost(
            "dotbf16_512",
            32,
            0.85,
            {"narrow": 4.7, "bytes": 9.4, "bf16": 10.0},
            "lookup512",
            floor=1.05,
            parts=_PAIRS,
        ),
        "avx512vnni": KernelCost(
            "dot8_512",
            64,
            0.6,
            {"narrow": 0.0, "bytes": 2.5},
            floor=1.0,
            parts=_DIGITS,
            digits=True,
        ),
        "avxvnni": KernelCost(
            "dot8_256", 32, 0.9, {"narrow": 0.0, "bytes": 4.0}, parts=_DIGITS, digits=True
        ),
        # More than its rate: the third digit is mostly zero, and a dot product takes two of the
        # three instructions.
        "avx2madd": KernelCost("madd256", 32, 1.4, {"narrow": 0.0}, parts=_DIGITS, digits=True),
        "amx": KernelCost(
            "tile_bf16",
            8192,
            0.32,
            {"narrow": 7.0, "bytes": 16.0, "bf16": 8.0},
            rows=16,
            parts=_TILES,
        ),
        "neon": KernelCost("fma128", 4, 0.8, {"narrow": 36.0, "bytes": 60.0}, "lookup128"),
    },
    "integers": {
        "generic": KernelCost("scalar", 1, 0.17, {"narrow": 190.0}, grouped=0.17),
        "avx2": KernelCost(
            "madd256", 32, 0.4, {"narrow": 5.4, "bytes": 8.0}, grouped=0.3, narrow=2.0
        ),
        "avx512": KernelCost(
            "madd512", 64, 0.4, {"narrow": 3.9, "bytes": 8.0}, grouped=0.3, narrow=2.0
        ),
        "avxvnni": KernelCost("dot8_256", 32, 0.8, {"narrow": 3.9, "bytes": 6.0}, grouped=0.5),
        "avx512vnni": KernelCost(
            "dot8_512", 64, 0.95, {"narrow": 3.9, "bytes": 4.0}, floor=0.7, grouped=0.7
        ),
        "amx": KernelCost(
            "tile_int8", 16384, 0.25, {"narrow": 15.0, "bytes": 4.5}, rows=16, grouped=0.15
        ),
        "neon": KernelCost("madd128", 16, 0.4, {"narrow": 12.0}, grouped=0.3),
        "dotprod": KernelCost("dot8_128", 16, 0.8, {"narrow": 12.0}, grouped=0.5),
        "i8mm": KernelCost("mmla128", 32, 0.8, {"narrow": 12.0}, grouped=0.5),
    },
}
"""Kind of kernels → instruction set → its costs."""


def can_multiply(isa: str, call: CallClass) -> bool:
    """Whether kernels of ``isa`` multiply such calls themselves; some hand what bf16 does not hold
    to another instruction set."""
    cost = COSTS[call.kernels].get(isa)
    if cost is None:
        return False
    if cost.digits:
        return call.decoded != call.weights and call.decoded in cost.decode
    return cost.parts is None or (call.weights != "wide" and call.x in cost.parts)
