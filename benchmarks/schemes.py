# SPDX-License-Identifier: Apache-2.0
"""The kinds of weight that are measured, by name.

Each is a case of the conformance kit, so its weights and their exact product come from there, plus
what is done to the activations. Nothing here says who can compute it: that is asked of the
registry.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vllm.compressed_linear import numerics
from vllm.compressed_linear.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.numerics import ElementType, uint
from vllm.compressed_linear.testing import Case, Problem
from vllm.compressed_linear.testing.cases import NF4


@dataclass(frozen=True)
class Scheme:
    """One kind of layer. ``group``: input channels per scale, −1 one scale per output channel.

    ``stock``: how vLLM itself would hold it, a kind that ``stock.py`` knows, or "" where vLLM has
    no such kind.
    """

    title: str
    element: ElementType
    group: int = 128
    scale_dtype: str = "bfloat16"
    dtype: str = "bfloat16"
    activation: ActivationSpec | None = None
    stock: str = ""

    def problem(self, n: int, k: int) -> Problem:
        """Weights [n, k] of this kind."""
        case = Case(
            self.element,
            n,
            k,
            self.group,
            scale_dtype=self.scale_dtype,
            input_dtype=self.dtype,
        )
        problem = case.build()
        problem.descriptor = self.descriptor(problem.descriptor)
        return problem

    def descriptor(self, weight_only: CompressedLinearDescriptor) -> CompressedLinearDescriptor:
        """``weight_only`` with the activations of this kind."""
        return dataclasses.replace(weight_only, activation=self.activation)


def _symmetric(bits: int) -> ElementType:
    return uint(bits, 1 << (bits - 1))


_INT8_TOKENS = ActivationSpec(_symmetric(8), dynamic=True, granularity="token")

SCHEMES: dict[str, Scheme] = {
    **{f"w{bits}": Scheme(f"{bits}-bit", _symmetric(bits), stock="wna16") for bits in range(1, 9)},
    "nf4": Scheme("nf4, groups of 64", NF4, 64),
    "fp6": Scheme("fp6 e3m2, groups of 32", numerics.E3M2, 32),
    "fp8": Scheme("fp8 e4m3, per channel", numerics.E4M3, -1, "float32", stock="fp8"),
    "bf16": Scheme("bf16", numerics.BF16, stock="dense"),
    "fp16": Scheme("fp16", numerics.FP16, dtype="float16", stock="dense"),
    "w8a8": Scheme(
        "W8A8 int8, per channel and token",
        _symmetric(8),
        -1,
        "float32",
        activation=_INT8_TOKENS,
        stock="int8",
    ),
    "w4a8": Scheme("W4A8 int8, groups of 128", _symmetric(4), activation=_INT8_TOKENS),
}
