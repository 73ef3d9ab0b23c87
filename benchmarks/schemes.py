# SPDX-License-Identifier: Apache-2.0
"""The kinds of weight that are measured, by name.

Each is a case of the conformance kit, so its weights and their exact product come from there.
Nothing here says who can compute it: that is asked of the registry.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import NF4, ElementType, uint
from vllm.compressed_linear.testing import Case, Problem


@dataclass(frozen=True)
class Scheme:
    """One kind of layer. ``case``: the weights and what is done to x; its sizes do not count.

    ``stock``: how vLLM itself would hold it, a kind that ``stock.py`` knows, or "" where vLLM has
    no kernel for CPUs that takes such weights.
    """

    title: str
    case: Case
    stock: str = ""

    def problem(self, n: int, k: int) -> Problem:
        """Weights [n, k] of this kind."""
        return dataclasses.replace(self.case, n=n, k=k, shards=(n,)).build()

    @property
    def integer(self) -> bool:
        """Whether the products are those of integers."""
        activation = self.case.activation
        return activation is not None and activation.element.kind == "integer"


def _symmetric(bits: int) -> ElementType:
    return uint(bits, 1 << (bits - 1))


def _weights(
    element: ElementType,
    group: int,
    scale_dtype: str = "bfloat16",
    *,
    zero: str | None = None,
    input_dtype: str = "bfloat16",
    block_rows: int = 1,
    row_scale: str | None = None,
    activation: ActivationSpec | None = None,
) -> Case:
    return Case(
        element,
        group=group,
        zero=zero,
        scale_dtype=scale_dtype,
        input_dtype=input_dtype,
        block_rows=block_rows,
        row_scale=row_scale,
        activation=activation,
    )


_INT8_TOKENS = ActivationSpec(_symmetric(8), dynamic=True, granularity="token")
_FP8_TOKENS = ActivationSpec(elements.E4M3, dynamic=True, granularity="token", maximum=448.0)

SCHEMES: dict[str, Scheme] = {
    **{
        f"w{bits}": Scheme(f"{bits}-bit, groups of 128", _weights(_symmetric(bits), 128), "wna16")
        for bits in range(1, 9)
    },
    "nf4": Scheme("nf4, groups of 64", _weights(NF4, 64)),
    "nvfp4": Scheme(
        "NVFP4, groups of 16",
        _weights(elements.E2M1, 16, "float8_e4m3fn", row_scale="tensor"),
    ),
    "mxfp4": Scheme("MXFP4, groups of 32", _weights(elements.E2M1, 32, "e8m0")),
    "mxfp6": Scheme("MXFP6 e3m2, groups of 32", _weights(elements.E3M2, 32, "e8m0")),
    "mxfp8": Scheme("MXFP8 e4m3, groups of 32", _weights(elements.E4M3, 32, "e8m0")),
    "fp8": Scheme("fp8 e4m3, per channel", _weights(elements.E4M3, -1, "float32")),
    "fp8-block": Scheme(
        "fp8 e4m3, blocks of 128x128", _weights(elements.E4M3, 128, "float32", block_rows=128)
    ),
    "bf16": Scheme("bf16", Case(elements.BF16), "dense"),
    "fp16": Scheme("fp16", Case(elements.FP16, input_dtype="float16"), "dense"),
    "w8a8": Scheme(
        "W8A8 int8, per channel and token",
        _weights(_symmetric(8), -1, "float32", activation=_INT8_TOKENS),
        "int8",
    ),
    "w4a8": Scheme(
        "W4A8 int8, groups of 128", _weights(_symmetric(4), 128, activation=_INT8_TOKENS)
    ),
    "w8a8-fp8": Scheme(
        "W8A8 fp8, per channel and token",
        _weights(elements.E4M3, -1, "float32", activation=_FP8_TOKENS),
        "fp8",
    ),
}

VARIANTS: dict[str, Scheme] = {
    "w4-g32": Scheme("4-bit, groups of 32", _weights(_symmetric(4), 32), "wna16"),
    "w4-channel": Scheme("4-bit, per channel", _weights(_symmetric(4), -1), "wna16"),
    "w4-zero": Scheme(
        "4-bit, zero points, groups of 128", _weights(uint(4), 128, zero="integer"), "wna16"
    ),
    "w4-fp16": Scheme(
        "4-bit, groups of 128, fp16 x",
        _weights(_symmetric(4), 128, "float16", input_dtype="float16"),
        "wna16",
    ),
}
"""Kinds that differ from one of ``SCHEMES`` in one thing, which vLLM has a kernel for."""

ZOO = SCHEMES | VARIANTS
