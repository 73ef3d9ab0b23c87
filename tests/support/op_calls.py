# SPDX-License-Identifier: Apache-2.0
"""The ops that multiply on the CPU, called with all of their arguments at once: those that
``make_problem`` parses at preparation, and those of each call."""

from __future__ import annotations

from typing import Any

import torch

from vllm.compressed_linear.backends.cpu.packing import Layout
from vllm.compressed_linear.backends.cpu.product import OPERANDS, activation_arguments
from vllm.compressed_linear.spec.descriptor import ActivationSpec

_PARSED = (
    *("layout", "n", "k", "group_size", "element", "element_bias", "perm", "columns"),
    *("activation", "dynamic", "granularity", "activation_group", "symmetric", "scale_dtype"),
    "maximum",
)
"""Arguments of ``make_problem``, but ``operands``."""

LAYOUTS: tuple[Layout, ...] = ("planes", "quads")


def activation(spec: ActivationSpec | None) -> dict[str, Any]:
    """Arguments for activations that are quantized so."""
    return activation_arguments(spec)


def parse(**given: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The problem of a call with these arguments, those of the call itself left out, and the
    tensors beside it."""
    names = [name for name in OPERANDS if given.get(name) is not None]
    problem = torch.ops.compressed_linear.make_problem(
        operands=" ".join(names), **{name: given[name] for name in _PARSED if name in given}
    )
    return problem, [given[name] for name in names]


def linear(*, layout: str = "planes", **given: Any) -> torch.Tensor:
    """``make_problem`` and ``linear``. With ``perm``, x has all of its columns."""
    columns = given["x"].shape[-1] if given.get("perm") is not None else None
    problem, tensors = parse(**{"layout": layout, "columns": columns} | given)
    return torch.ops.compressed_linear.linear(
        given["x"], problem, tensors, given.get("bias"), given["n"], given["out_dtype"]
    )


def embedding(*, channels: int, **given: Any) -> torch.Tensor:
    """``make_problem`` and ``embedding`` likewise."""
    problem, tensors = parse(layout="planes", columns=channels, **given)
    return torch.ops.compressed_linear.embedding(
        given["ids"], problem, tensors, channels, given["out_dtype"]
    )


def calls(prefix: str) -> int:
    """How often ops were called whose counter is ``prefix`` or begins with it and a slash."""
    from vllm.compressed_linear.machine import native

    return sum(
        count for name, count in native.call_counts().items() if f"{name}/".startswith(f"{prefix}/")
    )
