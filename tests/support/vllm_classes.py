# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernel classes driven from descriptors, and its own linear methods to compare with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.backends.vllm_native import (
    VllmNativeBackend,
    backend,
    op,
)
from vllm.compressed_linear.backends.vllm_native.classes import process
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import E4M3
from vllm.compressed_linear.testing.oracle import Case, Problem
from vllm.compressed_linear.testing.suite import FP8_BLOCK


def reasons(d: CompressedLinearDescriptor, platform: Platform) -> str:
    verdict = VllmNativeBackend.can_implement(d, platform)
    assert not verdict
    return "\n".join(verdict.reasons)


def assert_in_contract(case: Case, platform: Platform, rows: tuple[int, ...] = (1, 5)) -> str:
    """Prepare and run ``case`` as on ``platform``; the name of the class that ran."""
    problem = case.build()
    d = problem.descriptor
    verdict = VllmNativeBackend.can_implement(d, platform)
    assert verdict, str(verdict)
    with process.pretending(platform):
        tensors = backend.prepare(d, problem.weights, platform)
        assert all(type(tensor) is torch.Tensor for tensor in tensors.values())
        for count in rows:
            x = problem.activations(count)
            out = op.call(d, op.text_of(d), tensors, x, problem.bias, "cuda")
            check(problem, x, out, VllmNativeBackend)
    return VllmNativeBackend.variant(d, platform)


def check(
    problem: Problem, x: torch.Tensor, out: torch.Tensor, method: type[QuantLinearMethod]
) -> None:
    expected = problem.expected(x, problem.bias)
    bound = problem.bound(x, expected, method)
    assert out.dtype == getattr(torch, problem.descriptor.output_dtype)
    worst = float(((out.double() - expected).abs() / bound).max())
    assert worst <= 1, f"{problem.case}: {worst:.3g} times the error allowed"


def vllms_layer(method: Any, tensors: dict[str, torch.Tensor], n: int, k: int) -> torch.nn.Module:
    """``create_weights``, the checkpoint's tensors, ``process_weights_after_loading``."""
    layer = torch.nn.Module()
    layer.params_dtype = torch.bfloat16  # type: ignore[assignment]
    method.create_weights(
        layer=layer,
        output_partition_sizes=[n],
        input_size_per_partition=k,
        input_size=k,
        output_size=n,
        params_dtype=torch.bfloat16,
        weight_loader=lambda *_: None,
    )
    for name, tensor in tensors.items():
        getattr(layer, name).data.copy_(tensor)
    method.process_weights_after_loading(layer)
    return layer


GROUPS = ActivationSpec(E4M3, True, "group", group_size=128, maximum=448.0)


BLOCKS = replace(FP8_BLOCK, n=384, shards=(), activation=GROUPS)
