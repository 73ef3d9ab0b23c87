# SPDX-License-Identifier: Apache-2.0
"""What the adapters hand to vLLM's kernel classes for GPUs is what vLLM's own linear methods make
of the same weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.gpu_cases import (
    A100,
    FP8,
    FP8_TOKEN,
    FP8_W8A8,
    H100,
    INT4,
    MACHETE,
    NVFP4,
    STATIC,
    W8A8,
    needs_classes,
    symmetric,
)
from tests.support.vllm_classes import vllms_layer
from vllm.compressed_linear.backends.vllm_native import backend, table
from vllm.compressed_linear.backends.vllm_native.classes import process
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.spec.packing import Packing, pack, unpack
from vllm.compressed_linear.testing.oracle import Case

pytestmark = [needs_classes, pytest.mark.usefixtures("doubles")]


@pytest.mark.parametrize("zero", [None, "integer"])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("platform", [A100, H100], ids=lambda p: p.name)
def test_compressed_tensors_method_builds_the_same(
    zero: str | None, group: int, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor import parameter
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16,
    )

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    element = symmetric(4) if zero is None else uint(4)
    problem = replace(INT4, element=element, zero=zero, group=group).build()
    d, stored = problem.descriptor, problem.own.shards[0].tensors
    own = {"weight_packed": stored["codes"], "weight_scale": stored["scale"]}
    if zero is not None:
        # The kit packs zero points along N in [N, G] with N in containers, as this method does.
        own["weight_zero_point"] = stored["zero"]
    if zero is not None:
        # vLLM would take Machete on Hopper; ours does not, because of its zero points.
        monkeypatch.setenv("VLLM_DISABLED_KERNELS", MACHETE)
    with process.pretending(platform), process.configured():
        strategy = "channel" if group == -1 else "group"
        method = CompressedTensorsWNA16(
            strategy=strategy,
            num_bits=4,
            group_size=None if group == -1 else group,
            symmetric=zero is None,
        )
        theirs = vllms_layer(method, own, d.n, d.k)
        ours = backend.prepare(d, problem.weights, platform)
    adapter = table.preferred(table.answers(d, platform))
    assert adapter is not None
    assert type(method.kernel).__name__ == adapter.kernel
    compared = 0
    for name, parameter_ in theirs.named_parameters():
        if name == "weight_shape":
            continue
        tensor = ours[f"{adapter.tag}_{name}"]
        assert tensor.dtype == parameter_.dtype, name
        assert tensor.shape == parameter_.shape, name
        assert tensor.stride() == parameter_.stride(), name
        assert torch.equal(tensor, parameter_.data), name
        compared += 1
    assert compared == len(ours)


GPTQ_NAMES = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}
_PLAIN_BF16 = replace(INT4, group=128)


def _gptq(stored: Any, case: Case) -> tuple[Any, dict[str, torch.Tensor], dict[str, str]]:
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQLinearMethod
    from vllm.scalar_type import scalar_types

    config = SimpleNamespace(quant_type=scalar_types.uint4b8, group_size=case.group, pack_factor=8)
    tensors = {
        "qweight": stored["codes"].t(),
        "scales": stored["scale"].t(),
    }
    return AutoGPTQLinearMethod(config), tensors, GPTQ_NAMES


def _awq(stored: Any, case: Case) -> tuple[Any, dict[str, torch.Tensor], dict[str, str]]:
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQMarlinLinearMethod
    from vllm.scalar_type import scalar_types

    config = SimpleNamespace(
        quant_type=scalar_types.uint4, group_size=case.group, pack_factor=8, zero_point=True
    )
    codes = unpack(stored["codes"], Packing(4, "K"), case.k, 1)
    zeros = unpack(stored["zero"], Packing(4, "N"), case.n, 0)
    awq = Packing(4, "N", order=(0, 2, 4, 6, 1, 3, 5, 7))
    tensors = {
        "qweight": pack(codes.t(), awq),
        "qzeros": pack(zeros.t(), awq),
        "scales": stored["scale"].t(),
    }
    return AutoAWQMarlinLinearMethod(config), tensors, GPTQ_NAMES


def _int8_method(stored: Any, case: Case) -> tuple[Any, dict[str, torch.Tensor], dict[str, str]]:
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsW8A8Int8,
    )

    assert case.activation is not None
    method = CompressedTensorsW8A8Int8(
        "channel",
        is_static_input_scheme=not case.activation.dynamic,
        input_symmetric=case.activation.symmetric,
    )
    tensors = {
        "weight": (stored["codes"].view(torch.uint8) ^ 128).view(torch.int8),
        "weight_scale": stored["scale"],
    }
    tensors |= {name: stored[name] for name in ("input_scale",) if name in stored}
    return method, tensors, {}


def _fp8_method(name: str) -> Any:
    def make(stored: Any, case: Case) -> tuple[Any, dict[str, torch.Tensor], dict[str, str]]:
        from compressed_tensors.quantization import QuantizationArgs
        from vllm.model_executor.layers.quantization.compressed_tensors import schemes

        weights = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
        method = getattr(schemes, name)(weights, False)
        tensors = {
            "weight": stored["codes"].view(torch.float8_e4m3fn),
            "weight_scale": stored["scale"],
        }
        return method, tensors, {}

    return make


def _nvfp4_method(stored: Any, case: Case) -> tuple[Any, dict[str, torch.Tensor], dict[str, str]]:
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsW4A4Fp4,
    )

    tensors = {
        "weight_packed": stored["codes"].view(torch.uint8),
        "weight_scale": stored["scale"],
        "weight_global_scale": 1 / stored["row_scale"],
    }
    return CompressedTensorsW4A4Fp4(use_a16=True), tensors, {}


_METHODS = {
    "GPTQ": (_PLAIN_BF16, A100, _gptq),
    "GPTQ on Hopper": (_PLAIN_BF16, H100, _gptq),
    "AWQ": (replace(_PLAIN_BF16, element=uint(4), zero="integer"), A100, _awq),
    "int8 per token": (W8A8, A100, _int8_method),
    "int8 static": (replace(W8A8, activation=STATIC), A100, _int8_method),
    "fp8 weights": (FP8, A100, _fp8_method("CompressedTensorsW8A16Fp8")),
    "fp8": (
        replace(FP8_W8A8, activation=FP8_TOKEN),
        H100,
        _fp8_method("CompressedTensorsW8A8Fp8"),
    ),
    "NVFP4": (NVFP4, A100, _nvfp4_method),
}


@pytest.mark.parametrize("name", _METHODS)
def test_vllms_own_method_builds_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor import parameter
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8,
        compressed_tensors_w8a16_fp8,
    )

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    for module in (compressed_tensors_w8a8_fp8, compressed_tensors_w8a16_fp8):
        monkeypatch.setattr(module, "get_current_vllm_config", lambda: config)
    case, platform, make = _METHODS[name]
    problem = case.build()
    d = problem.descriptor
    with (
        process.pretending(platform),
        process.configured(),
        process.default_dtype(torch.bfloat16),
    ):
        method, tensors, names = make(problem.own.shards[0].tensors, case)
        theirs = vllms_layer(method, tensors, d.n, d.k)
        ours = backend.prepare(d, problem.weights, platform)
    adapter = table.preferred(table.answers(d, platform))
    assert adapter is not None
    kernel = getattr(method, "kernel", None) or getattr(method, "linear_kernel", None)
    kernel = kernel or method.fp8_linear
    assert type(kernel).__name__ == adapter.kernel
    assert ours
    for full_name, tensor in ours.items():
        own = full_name.removeprefix(f"{adapter.tag}_")
        other = getattr(theirs, names.get(own, own))
        assert tensor.dtype == other.dtype, own
        assert tensor.squeeze().shape == other.squeeze().shape, own
        if tensor.dim() > 1:
            assert tensor.stride() == other.stride(), own
        if own == "weight_global_scale":  # a divisor in the file
            torch.testing.assert_close(tensor, other.data)
            continue
        raw = (tensor.squeeze(), other.data.squeeze())
        same = [t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in raw]
        assert torch.equal(*same), own
