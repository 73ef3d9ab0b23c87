# SPDX-License-Identifier: Apache-2.0
"""Packed weights of layout "quads" for the op ``linear``, with their exact meaning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.support import op_calls
from tests.support.cpu_library import tiled
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import INT8

TOKEN = ActivationSpec(INT8, True, "token")


STATIC = ActivationSpec(INT8, False, "tensor")


ACTIVATIONS = [
    TOKEN,
    replace(TOKEN, maximum=127.5),
    replace(TOKEN, symmetric=False),
    ActivationSpec(INT8, True, "group", group_size=32),
    ActivationSpec(INT8, True, "group", group_size=64, symmetric=False),
    STATIC,
    replace(STATIC, symmetric=False),
]


# (N, K, group): whole strips and ragged ones, groups across blocks, one group for all.
SHAPES = [(64, 256, 128), (37, 192, 32), (150, 100, 100), (33, 80, 20), (70, 1160, 1160)]


@dataclass
class Layer:
    """Codes, and what they mean: ``weight`` and ``magnitude`` float64 [N, K]."""

    n: int
    k: int
    group: int
    bits: int
    codes: torch.Tensor
    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    weight: torch.Tensor
    magnitude: torch.Tensor

    @property
    def element(self) -> str:
        return f"uint{self.bits}"


def layer(
    n: int = 64, k: int = 256, group: int = 128, bits: int = 4, *, zero: bool = False, seed: int = 0
) -> Layer:
    generator = torch.Generator().manual_seed(seed + bits + k)
    codes = torch.randint(1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, k // group, generator=generator) * 0.1
    middle = 1 << (bits - 1)
    wide = codes.double() - middle
    away = torch.zeros(n, k // group, dtype=torch.float64)
    zeros = None
    if zero:
        zeros = torch.randint(1 << bits, (n, k // group), generator=generator).float()
        away = zeros.double() - middle
    spread = scale.double().repeat_interleave(group, 1)
    away = away.repeat_interleave(group, 1)
    ops = torch.ops.compressed_linear
    shape = ops.packed_shape("quads", n, k, group, f"uint{bits}")
    packed = torch.empty(shape, dtype=torch.uint8)
    ops.pack_rows("quads", packed, codes, 0, n, group, f"uint{bits}")
    return Layer(
        n,
        k,
        group,
        bits,
        codes,
        packed,
        tiled(scale),
        None if zeros is None else tiled(zeros),
        (wide - away) * spread,
        (wide.abs() + away.abs()) * spread,
    )


def arguments(w: Layer, x: torch.Tensor, spec: ActivationSpec = TOKEN) -> dict[str, Any]:
    group = spec.group_size if spec.granularity == "group" else 0
    sums = None
    if not spec.symmetric:
        sums = torch.ops.compressed_linear.code_sums(w.packed, w.n, w.k, w.group, w.element, group)
    return {
        "x": x,
        "packed": w.packed,
        "scale": w.scale,
        "zero": w.zero,
        "row_scale": None,
        "bias": None,
        "perm": None,
        "prescale": None,
        "input_scale": torch.tensor([0.02]) if spec.needs_scale else None,
        "input_zero": torch.tensor([-9], dtype=torch.int32) if spec.needs_zero else None,
        "code_sums": sums,
        "n": w.n,
        "k": w.k,
        "group_size": w.group,
        "element": w.element,
        "element_bias": 0 if w.zero is not None else 1 << (w.bits - 1),
        "out_dtype": torch.float32,
    } | op_calls.activation(spec)
