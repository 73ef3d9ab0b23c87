# SPDX-License-Identifier: Apache-2.0
"""What runs of vLLM's own kernel class for CPUs, and how the compiler takes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.cpu_wna16 import HERE, needs_kernel, part_of, prepared, values
from vllm.compressed_linear.backends import vllm_native
from vllm.compressed_linear.backends.vllm_native import VllmNativeBackend, op
from vllm.compressed_linear.backends.vllm_native.classes import mixed_precision

pytestmark = pytest.mark.usefixtures("fresh_answers")


@needs_kernel
def test_vllms_own_class_repacks_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    ran: list[str] = []

    def recorded(method: str) -> Any:
        real = getattr(CPUWNA16LinearKernel, method)

        def record(self: Any, *args: Any, **keywords: Any) -> Any:
            ran.append(method)
            return real(self, *args, **keywords)

        return record

    for method in ("process_weights_after_loading", "apply_weights"):
        monkeypatch.setattr(CPUWNA16LinearKernel, method, recorded(method))
    part = part_of("gptq", values(zero=True))
    assert VllmNativeBackend.variant(part.descriptor, HERE) == CPUWNA16LinearKernel.__name__
    backend, tensors = prepared(part)
    assert ran == ["process_weights_after_loading"]
    vllm_native.CALLS.reset()
    backend.apply(tensors, torch.randn(2, 128).bfloat16())
    backend.apply(tensors, torch.randn(1, 128).bfloat16())
    assert ran.count("apply_weights") == vllm_native.CALLS.count == 2


@needs_kernel
def test_a_new_instance_needs_only_the_tensors() -> None:
    """Prepared tensors may come from another process: nothing else may be remembered."""
    part = part_of("gptq", values(zero=True))
    backend, tensors = prepared(part)
    x = torch.randn(2, 128).bfloat16()
    want = backend.apply(tensors, x)
    op.ready.cache_clear()
    mixed_precision.repacked_attributes.cache_clear()
    copied = {name: tensor.clone() for name, tensor in tensors.items()}
    assert torch.equal(VllmNativeBackend(part.descriptor).apply(copied, x), want)


@needs_kernel
@pytest.mark.parametrize("ordered", [False, True], ids=["", "act order"])
def test_compiled_without_a_graph_break_and_still_counted(ordered: bool) -> None:
    index = (torch.arange(128) // 32).flip(0)
    part = part_of("gptq", replace(values(zero=True), index=index if ordered else None))
    backend, tensors = prepared(part)
    bias = torch.randn(64).bfloat16()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(backend.apply(tensors, x * 2, bias)) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (3, 8, 1):
        x = torch.randn(m, 128).bfloat16()
        vllm_native.CALLS.reset()
        got = compiled(x)
        assert vllm_native.CALLS.count == 1
        assert torch.equal(got, layer(x))


@needs_kernel
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
def test_the_op_is_a_well_behaved_custom_op(zero: bool) -> None:
    part = part_of("gptq", values(zero=zero))
    backend, prefixed = prepared(part)
    t = {name.removeprefix("cpuwna16_"): tensor for name, tensor in prefixed.items()}
    order = torch.arange(127, -1, -1, dtype=torch.int32)
    x = torch.randn(4, 128).bfloat16()
    for gather in (None, order):
        torch.library.opcheck(
            torch.ops.compressed_linear.vllm_native_linear.default,
            (
                *(x, list(t.values()), gather, None, None, ",".join(t)),
                *("cpuwna16", backend.text, "cpu", 64, torch.bfloat16),
            ),
        )
