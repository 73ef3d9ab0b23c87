# SPDX-License-Identifier: Apache-2.0
"""The call that the CPU backends share, and its constants, which are parsed at preparation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm.compressed_linear.backends.cpu.packing import Layout
from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor

OPERANDS = (
    *("packed", "scale", "zero", "row_scale", "table", "code_sums", "perm", "prescale"),
    *("input_scale", "input_zero"),
)
"""Names of the tensors of a call, in the op's order."""

_SCALE_DTYPES = {"float32": "float32", "e8m0": "e8m0", "float8_e4m3fn": "e4m3"}


def operands(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """A layer's prepared ``tensors`` as ``linear`` and ``embedding`` take them."""
    return [tensors[name] for name in OPERANDS if name in tensors]


def make_problem(
    layout: Layout,
    descriptor: CompressedLinearDescriptor,
    element: str,
    activation: ActivationSpec | None,
    tensors: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The constants of a layer's calls, int64: what ``linear`` and ``embedding`` take by value, and
    the ``operands`` of ``tensors`` with them."""
    d = descriptor
    return torch.ops.compressed_linear.make_problem(
        layout,
        d.n,
        d.k,
        d.group_size,
        element,
        d.weight.element.bias,
        " ".join(name for name in OPERANDS if name in tensors),
        tensors.get("perm"),
        d.in_features,
        **activation_arguments(activation),
    )


def activation_arguments(activation: ActivationSpec | None) -> dict[str, Any]:
    """Quantization of x, as the arguments of ``make_problem``."""
    if activation is None:
        return {}
    a = activation
    return {
        "activation": f"int{a.element.bits}" if a.element.kind == "integer" else a.element.name,
        "dynamic": a.dynamic,
        "granularity": a.granularity,
        "activation_group": a.group_size,
        "symmetric": a.symmetric,
        "scale_dtype": _SCALE_DTYPES[a.scale_dtype],
        "maximum": a.maximum,
    }


def multiply(
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y [..., N] of x [..., K] and a layer's prepared ``tensors``."""
    # Each reshape costs a microsecond in eager mode.
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = torch.ops.compressed_linear.linear.default(
        rows, tensors["problem"], operands(tensors), bias, n, out_dtype
    )
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], n)
