# SPDX-License-Identifier: Apache-2.0
"""The ops that multiply on the CPU, called with all of their arguments at once: those that
``make_problem`` parses at preparation, and those of each call."""

from __future__ import annotations

from typing import Any

import torch

from vllm.compressed_linear.backends.cpu.product import activation_arguments
from vllm.compressed_linear.spec.descriptor import ActivationSpec

PARSED = (
    *("layout", "n", "k", "group_size", "element", "element_bias", "perm", "columns"),
    *("activation", "dynamic", "granularity", "activation_group", "symmetric", "scale_dtype"),
    "maximum",
)
"""Arguments of ``make_problem``."""

_LINEAR = (
    *("scale", "zero", "row_scale", "table", "code_sums", "perm", "prescale", "input_scale"),
    *("input_zero", "bias"),
)
_EMBEDDING = ("scale", "zero", "row_scale", "table", "perm")


def parse(**given: Any) -> torch.Tensor:
    """The problem of a call with these arguments, those of the call itself left out."""
    ops = torch.ops.compressed_linear
    return ops.make_problem(**{name: given[name] for name in PARSED if name in given})


def activation(spec: ActivationSpec | None) -> dict[str, Any]:
    """Arguments for activations that are quantized so."""
    return activation_arguments(spec)


def linear(*, layout: str = "planes", **given: Any) -> torch.Tensor:
    """``make_problem`` and ``linear``. Tensors that are not ``given`` are None; with ``perm``, x
    has all of its columns."""
    call = {name: given.get(name) for name in _LINEAR}
    for name in ("x", "packed", "n", "out_dtype"):
        call[name] = given[name]
    columns = given["x"].shape[-1] if given.get("perm") is not None else None
    problem = parse(**{"layout": layout, "columns": columns} | given)
    return torch.ops.compressed_linear.linear(problem=problem, **call)


def embedding(*, channels: int, **given: Any) -> torch.Tensor:
    """``make_problem`` and ``embedding`` likewise."""
    call = {name: given.get(name) for name in _EMBEDDING}
    for name in ("ids", "packed", "out_dtype"):
        call[name] = given[name]
    problem = parse(layout="planes", columns=channels, **given)
    return torch.ops.compressed_linear.embedding(problem=problem, channels=channels, **call)


def calls(prefix: str) -> int:
    """How often ops were called whose counter is ``prefix`` or begins with it and a slash."""
    from vllm.compressed_linear.machine import native

    return sum(
        count for name, count in native.call_counts().items() if f"{name}/".startswith(f"{prefix}/")
    )
