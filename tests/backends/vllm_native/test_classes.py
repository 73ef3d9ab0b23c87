# SPDX-License-Identifier: Apache-2.0
"""Every class in vLLM's tables for accelerators is driven or says why not; and those that are
rarely reached: torch's products for fp8, and Conch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import cuda_doubles, fp4_doubles
from tests.support.cuda_checks import expect, on, unreal
from tests.support.messages import says
from tests.support.vllm_classes import assert_in_contract, reasons, vllms_layer
from vllm.compressed_linear.backends.vllm_native import (
    VllmNativeBackend,
    backend,
    declined,
    op,
    table,
)
from vllm.compressed_linear.backends.vllm_native.classes import process, tables
from vllm.compressed_linear.backends.vllm_native.classes import scaled_mm as class_configs
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import E2M3, E4M3, uint
from vllm.compressed_linear.spec.packing import Packing, unpack
from vllm.compressed_linear.testing.oracle import Case

A100, L40S, H100 = (Platform.parse(f"cuda:{capability}") for capability in (80, 89, 90))
ROCM, XPU = Platform.parse("rocm"), Platform.parse("xpu")

pytestmark = pytest.mark.skipif(
    tables.unavailable("mixed precision") is not None,
    reason="this vLLM has no kernel classes that are known here",
)


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cuda_doubles.install()
    cuda_doubles.CALLED.clear()
    op.ready.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", fp4_doubles.scaled_mm)
    yield
    op.ready.cache_clear()


def listed(device: str) -> set[str]:
    """Every class that vLLM has for ``device``, in a table that is read here."""
    return {
        kernel.__name__
        for family in tables.TABLES
        for kernel in tables.kernel_classes(family, device)
    }


@pytest.mark.parametrize("device", ["cuda", "rocm", "xpu"])
def test_every_class_is_driven_or_says_why_not(device: str) -> None:
    driven = {a.kernel for a in table.ADAPTERS if device in a.devices}
    silent = {k for k in listed(device) - driven if declined.why(k) == declined.UNKNOWN}
    assert listed(device)
    assert not silent


def test_every_reason_is_of_a_class_that_vllm_has() -> None:
    known = set().union(*(listed(device) for device in ("cuda", "rocm", "xpu")))
    driven = {a.kernel for a in table.ADAPTERS if a.devices == {"cuda", "rocm"}}
    for number, (prefix, _) in enumerate(declined.REASONS):
        own = {kernel for kernel in known if kernel.startswith(prefix)}
        own -= {k for k in own if any(k.startswith(p) for p, _ in declined.REASONS[:number])}
        assert own, prefix
        assert not own & {k for k in driven if declined.why(k) == declined.UNKNOWN}, prefix


def test_a_class_that_vllm_adds_is_named_and_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    added = type("NextYearsLinearKernel", (), {})
    monkeypatch.setattr(tables, "kernel_classes", lambda family, device: [added])
    text = reasons(Case(uint(4, 8), 128, 256, 128).build().descriptor, A100)
    assert text == f"NextYearsLinearKernel: {declined.UNKNOWN}"


def test_mxfp6_says_what_vllm_has_for_it() -> None:
    text = reasons(Case(E2M3, scale_dtype="e8m0").build().descriptor, H100)
    assert says(text, "HummingMxFp6LinearKernel", "humming")
    assert says(text, "EmulationMxfp6LinearKernel", "emulation")


def test_mx_activations_say_what_would_run_them() -> None:
    mx = ActivationSpec(E4M3, True, "group", group_size=32, scale_dtype="e8m0", maximum=256.0)
    case = Case(E4M3, scale_dtype="e8m0", activation=mx)
    text = reasons(case.build().descriptor, Platform.parse("cuda:100"))
    assert says(text, "FlashInferCutlassMxfp8LinearKernel", "FlashInfer")
    assert says(text, "MarlinMxfp8LinearKernel", "e4m3 dynamic per group with e8m0 scales")


# --- torch's products for fp8 --------------------------------------------------------------------

TENSOR, CHANNEL = (f"{kind}TorchFP8ScaledMMLinearKernel" for kind in ("PerTensor", "ChannelWise"))
_TOKEN = ActivationSpec(E4M3, True, "token", maximum=448.0)
_TENSOR = replace(_TOKEN, granularity="tensor")
_FP8 = Case(E4M3, 128, 256, -1, scale_dtype="float32", activation=_TOKEN)


@pytest.fixture
def no_cutlass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "CutlassFP8ScaledMMLinearKernel")


@pytest.mark.parametrize(
    ("activation", "kernel"),
    [(_TOKEN, CHANNEL), (_TENSOR, TENSOR), (replace(_TENSOR, dynamic=False), TENSOR)],
    ids=str,
)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"group": 0},
        {"input_dtype": "float16", "output_dtype": ""},
        {"n": 96, "shards": (32, 64), "group": 0, "bias_dtype": "bfloat16"},
    ],
    ids=["channel", "tensor", "float16", "fused"],
)
@pytest.mark.usefixtures("no_cutlass")
def test_fp8_without_cutlass_runs_on_torch(
    activation: ActivationSpec, kernel: str, change: dict[str, Any]
) -> None:
    case = replace(_FP8, activation=activation, **change)
    assert assert_in_contract(case, L40S, rows=(1, 5, 40)) == kernel


@pytest.mark.usefixtures("no_cutlass")
def test_each_of_torch_s_classes_has_activations_of_its_own() -> None:
    d = _FP8.build().descriptor
    asked = {a.kernel: a.reasons for a in table.answers(d, L40S)}
    assert asked[TENSOR] == ("requires per tensor activation and weight scales.",)
    asked = {a.kernel: a.reasons for a in table.answers(replace(d, activation=_TENSOR), L40S)}
    (reason,) = asked[CHANNEL]
    assert "it reads a scale for each token, and there is one" in reason
    assert f"{TENSOR}: requires a platform with torch FP8" in reasons(d, A100)


def test_vllm_s_class_for_channels_fails_with_one_scale_of_x() -> None:
    """The reason why it is declined there."""
    x = torch.randn(5, 256).bfloat16()
    with process.pretending(L40S), process.configured():
        config = class_configs.fp8_config(
            128, 256, torch.bfloat16, weight="channel", activation="dynamic tensor"
        )
        kernel = tables.kernel_class("fp8", "cuda", CHANNEL)(
            config, layer_param_names=class_configs.FP8_NAMES
        )
        class_configs.quantize_without_compiler(kernel)
        layer = SimpleNamespace(
            weight=torch.zeros(128, 256, dtype=torch.float8_e4m3fn).t(),
            weight_scale=torch.ones(128, 1),
        )
        with pytest.raises(RuntimeError, match="exceeds dimension size"):
            kernel.apply_weights(layer, x)


@pytest.mark.parametrize("kernel", [CHANNEL, TENSOR])
@pytest.mark.usefixtures("no_cutlass")
def test_torch_gets_what_vllm_s_own_method_builds(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor import parameter
    from vllm.model_executor.layers.quantization.compressed_tensors import schemes
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8,
    )

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    monkeypatch.setattr(compressed_tensors_w8a8_fp8, "get_current_vllm_config", lambda: config)
    per_tensor = kernel == TENSOR
    activation = replace(_TENSOR, dynamic=False) if per_tensor else _TOKEN
    problem = replace(_FP8, activation=activation, group=0 if per_tensor else -1).build()
    d, stored = problem.descriptor, problem.own.shards[0].tensors
    tensors = {
        "weight": stored["codes"].view(torch.float8_e4m3fn),
        "weight_scale": stored["scale"],
    }
    tensors |= {"input_scale": stored["input_scale"]} if per_tensor else {}
    arguments = QuantizationArgs(
        num_bits=8, type="float", strategy="tensor" if per_tensor else "channel", symmetric=True
    )
    with (
        process.pretending(L40S),
        process.configured(),
        process.default_dtype(torch.bfloat16),
    ):
        method = schemes.CompressedTensorsW8A8Fp8(arguments, per_tensor)
        theirs = vllms_layer(method, tensors, d.n, d.k)
        ours = backend.prepare(d, problem.weights, L40S)
    assert type(method.fp8_linear).__name__ == kernel
    adapter = table.preferred(table.answers(d, L40S))
    assert adapter is not None
    assert adapter.kernel == kernel
    assert len(ours) == len(tensors)
    for full_name, tensor in ours.items():
        name = full_name.removeprefix(f"{adapter.tag}_")
        other = getattr(theirs, name).data
        assert tensor.dtype == other.dtype, name
        assert tensor.squeeze().shape == other.squeeze().shape, name
        raw = [t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (tensor, other)]
        assert torch.equal(*(t.squeeze() for t in raw)), name
        if tensor.dim() > 1:
            assert tensor.stride() == other.stride(), name


@pytest.mark.parametrize("activation", [_TOKEN, _TENSOR], ids=str)
@pytest.mark.parametrize("m", [1, 300])
@pytest.mark.usefixtures("no_cutlass")
def test_torch_s_classes_apply_on_fake_cuda_tensors(m: int, activation: ActivationSpec) -> None:
    case = replace(_FP8, activation=activation, bias_dtype="bfloat16")
    problem = case.build()
    d = problem.descriptor
    with process.pretending(L40S):
        tensors = backend.prepare(d, problem.weights, L40S)
        out = on_fake_gpu(d, tensors, m)
    assert (out.device.type, out.shape, out.dtype) == ("cuda", (m, d.n), torch.bfloat16)


def on_fake_gpu(d: Any, tensors: dict[str, torch.Tensor], m: int) -> torch.Tensor:
    tag = next(iter(tensors)).partition("_")[0]
    with FakeTensorMode():
        on_gpu = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            for name, t in tensors.items()
        }
        row_scale = on_gpu.pop(op.ROW_SCALE, None)
        own = {full.removeprefix(f"{tag}_"): tensor for full, tensor in on_gpu.items()}
        x = torch.empty(m, d.in_features, dtype=torch.bfloat16, device="cuda")
        bias = torch.empty(d.n, dtype=x.dtype, device="cuda")
        return op.multiply(x, own, None, row_scale, bias, tag, op.text_of(d), "cuda")


# --- Conch ---------------------------------------------------------------------------------------

CONCH = "ConchLinearKernel"
ASKED: list[dict[str, Any]] = []
"""What the package's function was called with, tensors apart."""


def mixed_precision_gemm(
    x: torch.Tensor,
    w_q_packed: torch.Tensor,
    w_s: torch.Tensor,
    w_zp: torch.Tensor | None,
    weight_size_bits: int,
    weight_bias: int,
    group_size: int,
) -> torch.Tensor:
    """The function of conch-triton-kernels 1.3 that vLLM calls, by its source: weights are rounded
    to the dtype of x, sums are fp32. Its kernel reads tiles of 64 by 64 without looking at N and K,
    and groups in halves or whole."""
    k, n = x.shape[1], w_q_packed.shape[1]
    expect(k % 64 == 0 and n % 64 == 0, f"N={n} K={k} are no whole tiles")
    expect(group_size in (128, k), f"groups of {group_size}")
    shape = (k * weight_size_bits // 32, n)
    expect(w_q_packed.shape == shape, f"codes {w_q_packed.shape}")
    expect(w_q_packed.dtype == torch.int32, f"codes {w_q_packed.dtype}")
    expect(w_s.shape == (k // group_size, n) and w_s.dtype == x.dtype, "scales")
    expect(w_zp is None or w_zp.shape == w_s.shape, "zero points")
    expect(w_zp is None or w_zp.dtype == torch.uint8, "zero points")
    present = [t for t in (x, w_q_packed, w_s, w_zp) if t is not None]
    expect(all(t.is_contiguous() for t in present), "not contiguous")
    on(x.device, *present)
    ASKED.append({"bits": weight_size_bits, "bias": weight_bias, "group": group_size})
    if unreal(x):
        return x.new_empty(x.shape[0], n)
    codes = unpack(w_q_packed, Packing(weight_size_bits, "K"), k, 0).to(x.dtype) - weight_bias
    if w_zp is not None:
        codes = codes - w_zp.to(x.dtype).repeat_interleave(group_size, 0)
    weight = codes * w_s.repeat_interleave(group_size, 0)
    return (x.double() @ weight.double()).to(x.dtype)


@pytest.fixture
def conch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("conch", "conch.ops", "conch.ops.quantization", "conch.ops.quantization.gemm"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    module.mixed_precision_gemm = mixed_precision_gemm  # type: ignore[attr-defined]
    ASKED.clear()


_INT8_ZEROS = Case(uint(8), 128, 256, 128, zero="integer")


@pytest.mark.parametrize(
    "case",
    [
        _INT8_ZEROS,
        replace(_INT8_ZEROS, group=-1, bias_dtype="bfloat16"),
        replace(_INT8_ZEROS, input_dtype="float16", scale_dtype="float16", output_dtype="", k=384),
        replace(_INT8_ZEROS, order="act"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("conch")
def test_conch_takes_8_bits_with_zero_points(case: Case) -> None:
    assert assert_in_contract(case, H100) == CONCH
    group = case.k if case.group == -1 else case.group
    assert ASKED[0] == {"bits": 8, "bias": 0, "group": group}


@pytest.mark.parametrize(
    ("element", "zero"),
    [(uint(4, 8), None), (uint(8, 128), None), (uint(4), "integer"), (uint(4, 3), None)],
    ids=str,
)
@pytest.mark.usefixtures("conch")
def test_conch_takes_over_where_marlin_is_switched_off(
    element: Any, zero: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "MarlinLinearKernel")
    case = replace(_INT8_ZEROS, element=element, zero=zero)
    assert assert_in_contract(case, A100) == CONCH
    middle = element.bias if zero is None and element.bias == 1 << (element.bits - 1) else 0
    assert ASKED[0]["bias"] == middle


@pytest.mark.usefixtures("conch")
def test_conch_does_not_get_what_it_would_read_beyond() -> None:
    small = replace(_INT8_ZEROS, n=72, shards=()).build().descriptor
    assert says(reasons(small, A100), CONCH, "72x256", 64)
    short = replace(_INT8_ZEROS, k=96, group=-1).build().descriptor
    assert says(reasons(short, A100), CONCH, "128x96", 64)


def test_conch_has_to_be_installed() -> None:
    text = reasons(_INT8_ZEROS.build().descriptor, A100)
    assert says(text, CONCH, "conch-triton-kernels")


@pytest.mark.usefixtures("conch")
def test_conch_gets_what_vllm_s_own_method_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor import parameter
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16,
    )

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "MarlinLinearKernel")
    problem = replace(_INT8_ZEROS, element=uint(4)).build()
    d, stored = problem.descriptor, problem.own.shards[0].tensors
    own = {
        "weight_packed": stored["codes"],
        "weight_scale": stored["scale"],
        "weight_zero_point": stored["zero"],
    }
    with process.pretending(A100), process.configured():
        method = CompressedTensorsWNA16(
            strategy="group", num_bits=4, group_size=128, symmetric=False
        )
        theirs = vllms_layer(method, own, d.n, d.k)
        ours = backend.prepare(d, problem.weights, A100)
        x = problem.activations(5)
        expected = method.apply_weights(theirs, x, None)
        assert torch.equal(op.call(d, op.text_of(d), ours, x, None, "cuda"), expected)
        on_fake_gpu(d, ours, 300)
    assert type(method.kernel).__name__ == CONCH
    assert ASKED[0] == ASKED[1] == ASKED[2]
    assert len(ours) == len(own)
    for name in own:
        tensor, other = ours[f"conch_{name}"], getattr(theirs, name).data
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert tensor.stride() == other.stride(), name
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("platform", [ROCM, XPU], ids=lambda p: p.name)
def test_fp8_on_other_devices_says_why_it_is_not_driven(platform: Platform) -> None:
    text = reasons(_FP8.build().descriptor, platform)
    assert says(text, TENSOR, "CUDA")
    assert VllmNativeBackend.can_implement(_FP8.build().descriptor, L40S)
