# SPDX-License-Identifier: Apache-2.0
"""Packed weights for the ops ``linear`` and ``embedding``, with their exact meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.support import op_calls
from tests.support.cpu_library import tiled

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


DENSE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


INTEGERS = [f"uint{bits}" for bits in range(1, 9)]


# (N, K, group): whole tiles and ragged ones, groups across blocks, odd groups, a group for each
# channel, one group for all, more channels than one chunk.
SHAPES = [(48, 256, 128), (37, 192, 32), (150, 100, 100), (33, 40, 20), (20, 33, 1), (70, 384, 192)]


@dataclass
class Layer:
    """One weight, packed, with its exact meaning: ``weight`` and ``magnitude`` float64 [N, K]."""

    n: int
    k: int
    group: int
    element: str
    rows: torch.Tensor
    packed: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    element_bias: int
    weight: torch.Tensor
    magnitude: torch.Tensor

    def __call__(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        perm: torch.Tensor | None = None,
        out_dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> torch.Tensor:
        arguments = {
            "x": x,
            "packed": self.packed,
            "scale": self.scale,
            "zero": self.zero,
            "bias": bias,
            "perm": perm,
            "table": None,
            "n": self.n,
            "k": self.k,
            "group_size": self.group,
            "element": self.element,
            "element_bias": self.element_bias,
            "out_dtype": out_dtype,
        }
        return op_calls.linear(**(arguments | overrides))

    def check(self, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """|error| ≤ 4 √K 2⁻²⁴ Σ|x||w| and a rounding of the fp32 result."""
        expected = x.double() @ self.weight.t()
        size = x.double().abs() @ self.magnitude.t()
        if bias is not None:
            expected += bias.double()
            size += bias.double().abs()
        allowed = 4 * self.k**0.5 * 2.0**-24 * size + 1e-30
        assert y.dtype == torch.float32
        assert y.shape == expected.shape
        error = (y.double() - expected).abs()
        assert bool((error <= allowed).all()), float((error / allowed).max())


def pack(rows: torch.Tensor, group: int, element: str) -> torch.Tensor:
    ops = torch.ops.compressed_linear
    n, k = rows.shape
    packed = torch.empty(ops.packed_shape("planes", n, k, group, element)).byte()
    ops.pack_rows("planes", packed, rows, 0, n, group, element)
    return packed


def make_layer(
    shape: tuple[int, int, int],
    element: str,
    zero: str | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Layer:
    n, k, group = shape
    random = torch.Generator().manual_seed(seed)
    if element in DENSE:
        rows = torch.randn(n, k, generator=random).to(DENSE[element])
        weight = rows.double()
        packed = pack(rows, k, element)
        return Layer(n, k, k, element, rows, packed, None, None, 0, weight, weight.abs())
    bits, groups = int(element[4:]), k // group
    middle = 1 << (bits - 1)
    rows = torch.randint(0, 1 << bits, (n, k), generator=random, dtype=torch.uint8)
    scale = (0.01 + torch.rand(n, groups, generator=random)).to(scale_dtype)
    zeros = None
    if zero == "integer":
        zeros = torch.randint(0, (1 << bits) + 1, (n, groups), generator=random).bfloat16()
    elif zero == "float":
        zeros = (torch.rand(n, groups, generator=random) * (1 << bits)).to(scale_dtype)
    element_bias = middle if zero is None else 0
    offset = torch.zeros(n, groups) if zeros is None else zeros.float() - middle
    values = rows.double() - middle
    wide_scale = scale.double().repeat_interleave(group, 1)
    wide_offset = offset.double().repeat_interleave(group, 1)
    return Layer(
        n,
        k,
        group,
        element,
        rows,
        pack(rows, group, element),
        tiled(scale),
        None if zeros is None else tiled(zeros),
        element_bias,
        wide_scale * (values - wide_offset),
        wide_scale * (values.abs() + wide_offset.abs()),
    )
