# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernel classes for GPUs as a custom operator, on fake CUDA tensors and under the
compiler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import cuda_doubles
from tests.support.gpu_cases import (
    A100,
    FP8,
    FP8_TOKEN,
    FP8_W8A8,
    H100,
    INT4,
    MX,
    NVFP4,
    STATIC,
    W8A8,
    needs_classes,
)
from vllm.compressed_linear.backends.vllm_native import VllmNativeBackend, backend, op, table
from vllm.compressed_linear.backends.vllm_native.classes import process
from vllm.compressed_linear.machine.vllm_wheel import CUDA_OPS
from vllm.compressed_linear.spec.elements import BF16, E4M3
from vllm.compressed_linear.testing.oracle import Case

pytestmark = [needs_classes, pytest.mark.usefixtures("doubles")]


_FAKED = {
    "int4": (replace(INT4, order="act", group=64), A100),
    "int4 on Hopper": (replace(INT4, order="act", group=64), H100),
    "int8": (W8A8, A100),
    "int8 static, asymmetric": (
        replace(W8A8, activation=replace(STATIC, symmetric=False)),
        A100,
    ),
    "fp8": (replace(FP8_W8A8, activation=FP8_TOKEN), H100),
    "fp8 weights": (FP8, A100),
    "NVFP4": (replace(NVFP4, row_scale="row"), A100),
    "MXFP8": (replace(MX, element=E4M3), A100),
    "dense": (Case(BF16, 40, 96), A100),
}


@pytest.mark.parametrize("name", _FAKED)
@pytest.mark.parametrize("m", [1, 300])
def test_apply_on_fake_cuda_tensors(name: str, m: int) -> None:
    """Every tensor that reaches an operator is on the GPU and has the shape it asks for."""
    case, platform = _FAKED[name]
    problem = replace(case, bias_dtype="bfloat16").build()
    d = problem.descriptor
    with process.pretending(platform):
        tensors = backend.prepare(d, problem.weights, platform)
        with FakeTensorMode(), cuda_doubles.every_call():
            on_gpu = {
                name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                for name, t in tensors.items()
            }
            order, row_scale = (on_gpu.pop(name, None) for name in (op.ORDER, op.ROW_SCALE))
            tag = table.preferred(table.answers(d, platform)).tag  # type: ignore[union-attr]
            own = {full.removeprefix(f"{tag}_"): tensor for full, tensor in on_gpu.items()}
            x = torch.empty(m, d.in_features, dtype=torch.bfloat16, device="cuda")
            bias = torch.empty(d.n, dtype=x.dtype, device="cuda")
            cuda_doubles.CALLED.clear()
            out = op.multiply(x, own, order, row_scale, bias, tag, op.text_of(d), platform.device)
    assert out.device.type == "cuda"
    assert out.shape == (m, d.n)
    assert out.dtype == torch.bfloat16
    assert bool(cuda_doubles.CALLED) == (name != "dense")


def test_the_operator_is_a_well_behaved_custom_op() -> None:
    problem = replace(INT4, bias_dtype="bfloat16").build()
    d = problem.descriptor
    with process.pretending(A100):
        tensors = backend.prepare(d, problem.weights, A100)
        own = {k.removeprefix("marlin_"): v for k, v in tensors.items()}
        torch.library.opcheck(
            torch.ops.compressed_linear.vllm_native_linear.default,
            (
                problem.activations(4),
                list(own.values()),
                None,
                None,
                problem.bias,
                ",".join(own),
                "marlin",
                op.text_of(d),
                "cuda",
                d.n,
                torch.bfloat16,
            ),
        )


def test_apply_compiles_as_one_graph() -> None:
    """vLLM compiles models as one graph: whatever the compiler cannot follow would stop it."""
    problem = replace(INT4, bias_dtype="bfloat16").build()
    with process.pretending(A100):
        method = VllmNativeBackend(problem.descriptor)
        tensors = backend.prepare(problem.descriptor, problem.weights, A100)
        x = problem.activations(4)
        compiled = torch.compile(method.apply, fullgraph=True, backend="eager")
        assert torch.equal(
            compiled(tensors, x, problem.bias), method.apply(tensors, x, problem.bias)
        )


def test_the_wheels_operators_are_those_with_a_schema() -> None:
    assert {name.removeprefix("_C::") for name in CUDA_OPS} == {
        name.partition(".")[0] for name in cuda_doubles.SCHEMAS
    }
    on_gpus = [adapter for adapter in table.ADAPTERS if "cuda" in adapter.devices]
    wired = {name for adapter in on_gpus for name in adapter.ops}
    assert wired <= CUDA_OPS


def test_pretending_leaves_nothing_behind() -> None:
    from vllm.platforms import current_platform

    before = type(current_platform)
    with process.pretending(H100):
        assert current_platform.is_cuda()
        assert current_platform.is_device_capability(90)
        assert process.device() == "cuda"
    assert type(current_platform) is before
    assert process.device() == "cpu"
