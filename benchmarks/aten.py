# SPDX-License-Identifier: Apache-2.0
"""torch's own kernels as contenders: bf16 through oneDNN, and the packed matmuls of ATen."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.contender import Contender, Tensors
from vllm.compressed_linear.checkpoint.weights import to_standard_layout
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.testing import Problem


def plain(problem: Problem) -> Contender:
    """``F.linear`` on dequantized weights in the dtype of the activations."""
    dtype = torch_dtype(problem.descriptor.input_dtype)
    return Contender.prepared(
        f"F.linear, {problem.descriptor.input_dtype}",
        lambda x, t: F.linear(x, t["weight"]),
        lambda: {"weight": problem.weight.to(dtype, copy=True)},
        tolerance=0.02 if problem.descriptor.activation is None else 0.06,
    )


def int4(problem: Problem) -> Contender:
    """``_weight_int4pack_mm_for_cpu``: symmetric 4-bit codes in groups."""
    ops, group = torch.ops.aten, problem.descriptor.group_size
    standard = to_standard_layout(problem.descriptor, problem.weights)
    assert standard.scale is not None
    scale = standard.scale.t().contiguous()

    def prepare() -> Tensors:
        return {
            "packed": ops._convert_weight_to_int4pack_for_cpu(standard.codes.int(), 2),
            "scale_zero": torch.stack([scale, torch.zeros_like(scale)], 2).contiguous(),
        }

    return Contender.prepared(
        "ATen int4pack",
        lambda x, t: ops._weight_int4pack_mm_for_cpu(x, t["packed"], group, t["scale_zero"]),
        prepare,
    )


def int8(problem: Problem) -> Contender:
    """``_weight_int8pack_mm``: 8 bits per output channel, so the weights are quantized again and
    only roughly equal."""

    def prepare() -> Tensors:
        wide = problem.weight.float()
        scale = wide.abs().amax(1) / 127
        weight = (wide / scale[:, None]).round().to(torch.int8)
        return {"weight": weight, "scale": scale.bfloat16()}

    return Contender.prepared(
        "ATen int8pack, per channel",
        lambda x, t: torch.ops.aten._weight_int8pack_mm(x, t["weight"], t["scale"]),
        prepare,
        tolerance=0.05,
    )


def contenders(name: str, problem: Problem) -> list[Contender]:
    """Those that compute the scheme called ``name``."""
    found = [plain(problem)]
    if name == "w4":
        found.append(int4(problem))
    if name == "w8":
        found.append(int8(problem))
    return found
