# SPDX-License-Identifier: Apache-2.0
"""NVFP4 weights under NVFP4 activations on vLLM's classes, on a machine that has no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import cuda_doubles, fp4_doubles
from tests.support.messages import saying, says
from tests.support.vllm_classes import assert_in_contract, check, reasons, vllms_layer
from vllm.compressed_linear.backends.vllm_native import (
    VllmNativeBackend,
    backend,
    nvfp4,
    op,
    table,
)
from vllm.compressed_linear.backends.vllm_native.classes import process, tables
from vllm.compressed_linear.backends.vllm_native.nvfp4 import ACTIVATION
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.activation import quantize_dequantize
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.testing.oracle import Case
from vllm.compressed_linear.testing.suite import NVFP4, conformance_cases

CUTLASS, TORCH = "CutlassNvFp4LinearKernel", "TorchNvFp4LinearKernel"
B200, RTX5090 = Platform.parse("cuda:100"), Platform.parse("cuda:120")
W4A4 = replace(NVFP4, n=128, k=256, shards=(), activation=ACTIVATION)

pytestmark = pytest.mark.skipif(
    tables.unavailable("nvfp4") is not None,
    reason="this vLLM has no kernel classes that are known here",
)


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cuda_doubles.install(fp4_doubles.IMPLEMENTED)
    cuda_doubles.CALLED.clear()
    op.ready.cache_clear()
    # vLLM's reordering of scales copies them to the GPU, on which they are there.
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch, "_scaled_mm", fp4_doubles.scaled_mm)
    yield
    op.ready.cache_clear()


_CASES = [
    W4A4,
    replace(W4A4, input_dtype="float16", output_dtype=""),
    replace(W4A4, row_scale="channel"),
    replace(W4A4, n=72, k=80, bias_dtype="bfloat16", shards=()),
    replace(W4A4, n=1, k=16, shards=()),
    replace(W4A4, n=192, shards=(64, 96, 32)),
    replace(W4A4, order="act"),
    replace(W4A4, order="cut"),
    *(replace(W4A4, data=data) for data in ("signed", "largest", "huge", "tiny", "spread", "dead")),
]


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_results_are_in_the_contract(case: Case) -> None:
    assert assert_in_contract(case, B200, rows=(1, 5, 130)) == CUTLASS
    assert {"scaled_fp4_quant", "cutlass_scaled_fp4_mm"} <= set(cuda_doubles.CALLED)


@pytest.mark.parametrize("case", _CASES[:6], ids=str)
def test_torch_s_product_is_in_the_contract_too(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", CUTLASS)
    if case.input_dtype == "float16":
        text = reasons(case.build().descriptor, B200)
        assert says(text, TORCH, "float16", "bfloat16")
    else:
        assert assert_in_contract(case, B200) == TORCH
        assert f"{TORCH}: Torch NVFP4 requires sm_10x" in reasons(case.build().descriptor, RTX5090)


def test_the_kit_s_cases_with_results_in_16_bits_are_in_the_contract() -> None:
    found = [
        replace(case, output_dtype="")
        for case in conformance_cases()
        if case.activation == ACTIVATION and case.input_dtype != "float32" and not case.hadamard
    ]
    assert len(found) >= 8
    for case in found:
        assert assert_in_contract(case, B200, rows=(1, 17)) == CUTLASS


def test_a_wrong_code_and_a_wrong_scale_break_the_bound() -> None:
    problem = W4A4.build()
    d = problem.descriptor
    x = torch.eye(256).bfloat16()
    with process.pretending(B200):
        for name in ("cutlassnvfp4_weight", "cutlassnvfp4_weight_scale"):
            tensors = backend.prepare(d, problem.weights, B200)
            tensors[name].view(torch.uint8)[3, 5] ^= 1 << 2
            out = op.call(d, op.text_of(d), tensors, x, None, "cuda")
            with pytest.raises(AssertionError, match="times the error allowed"):
                check(problem, x, out, VllmNativeBackend)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 103, 120])
def test_the_plan_names_the_class_or_says_what_is_missing(capability: int) -> None:
    d, platform = W4A4.build().descriptor, Platform.parse(f"cuda:{capability}")
    if capability >= 100:
        assert VllmNativeBackend.variant(d, platform) == CUTLASS
        large = replace(d, in_features=8192, out_features=8192)
        fast = VllmNativeBackend.seconds(large, platform, 4096)
        assert fast < VllmNativeBackend.seconds(replace(large, activation=None), platform, 4096)
    else:
        text = reasons(d, platform)
        assert f"{CUTLASS}: CUTLASS FP4 kernels not available" in text
        assert says(text, "MarlinNvFp4LinearKernel", "e2m1 dynamic per group with e4m3 scales")


def test_what_the_class_computes_otherwise_is_declined() -> None:
    def found(case: Case) -> str:
        asked = table.answers(case.build().descriptor, B200)
        return "\n".join({a.kernel: a for a in asked}[CUTLASS].reasons)

    assert found(replace(W4A4, activation=None)) == "it quantizes x, which the descriptor does not"
    assert found(W4A4) == ""
    other = replace(ACTIVATION, maximum=4.0)
    assert says(found(replace(W4A4, activation=other)), other, ACTIVATION)
    assert says(found(replace(W4A4, group=32)), 32, 16)
    assert "scales without a second level" in found(replace(W4A4, row_scale=None))


def test_a_static_scale_that_is_no_positive_number_stops_the_load() -> None:
    problem = W4A4.build()
    problem.weights.input_scale = torch.tensor([-0.5])
    with (
        process.pretending(B200),
        pytest.raises(ValueError, match=saying("scale", "x", "-0.5", "positive")),
    ):
        backend.prepare(problem.descriptor, problem.weights, B200)


def test_layers_with_unlike_input_scales_are_parts_of_their_own() -> None:
    shards = list(replace(W4A4, shards=(64, 64)).build().weights.shards)
    shards[1].tensors["input_scale"] = shards[1].tensors["input_scale"] * 2
    parts = refine(shards, LayerContext("bfloat16", "bfloat16"))
    assert [part.descriptor.n for part in parts] == [64, 64]
    with process.pretending(B200):
        made = [backend.prepare(part.descriptor, part.weights, B200) for part in parts]
    one, two = (float(tensors["cutlassnvfp4_input_global_scale_inv"]) for tensors in made)
    assert two == one / 2


# --- quantizing x --------------------------------------------------------------------------------


def test_the_double_quantizes_as_vllm_s_reference_does() -> None:
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant

    from vllm import _custom_ops

    x, scale = W4A4.build().activations(130), torch.tensor(37.5)
    codes, tiles = _custom_ops.scaled_fp4_quant(x, scale, backend="cutlass", padded_n=288)
    values, groups = ref_nvfp4_quant(x, scale, 16)
    assert torch.equal(tiles.flatten()[fp4_doubles.place(130, 18)[:, :16]].float(), groups)
    unpacked = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    assert torch.equal(nvfp4.ACTIVATION.element.decode(unpacked[:, :256]), values)
    assert not unpacked[:, 256:].any()


def test_slack_reaches_every_neighbour_that_reciprocals_can_make_of_x() -> None:
    """Scales and codes on ties: each may fall to either side, and both of them together."""
    static = torch.tensor([1 / 3])
    x = torch.zeros(3, 16)
    x[0, :3] = torch.tensor([6.0, 2.5, 2.4]) / 3
    # 17 lies between 16 and 18, two scales of e4m3.
    x[1, :3] = torch.tensor([6 * 17.0, 16 * 2.5, 18 * 2.5]) / 3
    found = nvfp4.slack(x, static)
    # Under the scale 16 they are 2.5 and 2.8 to be rounded, under 18 they are 2.2 and 2.5.
    assert found[0, 1] * 3 == pytest.approx(1, rel=1e-4)
    assert found[0, 2] * 3 < 1e-4
    assert found[1, 0] * 3 == pytest.approx(6 * 2, rel=1e-4)
    taken = quantize_dequantize(x, ACTIVATION, static)[1, 1:3] * 3
    possible = [[16 * 2, 16 * 3, 18 * 2], [16 * 3, 18 * 2, 18 * 3]]
    for value, bound, others in zip(taken, found[1, 1:3] * 3, possible, strict=True):
        reach = max(abs(float(value) - other) for other in others)
        assert float(bound) == pytest.approx(reach, rel=1e-4)
    assert not found[2].any()


# --- what vLLM's own method would have built ------------------------------------------------------


def _compressed_tensors(stored: dict[str, torch.Tensor]) -> tuple[Any, Any, dict[str, Any]]:
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsW4A4Fp4,
    )

    method = CompressedTensorsW4A4Fp4()
    tensors = {
        "weight_packed": stored["codes"].view(torch.uint8),
        "weight_scale": stored["scale"],
        "weight_global_scale": 1 / stored["row_scale"],
        "input_global_scale": 1 / stored["input_scale"],
    }
    return method, method.apply_weights, tensors


def _model_opt(stored: dict[str, torch.Tensor]) -> tuple[Any, Any, dict[str, Any]]:
    from vllm.model_executor.layers.quantization import modelopt

    found = modelopt.resolve("NVFP4", SimpleNamespace(group_size=16), "layer")
    method = modelopt.ModelOptLinearMethod(*found)
    tensors = {
        "weight": stored["codes"].view(torch.uint8),
        "weight_scale": stored["scale"],
        "weight_scale_2": stored["row_scale"],
        "input_scale": stored["input_scale"],
    }
    return method, method.apply, tensors


@pytest.mark.parametrize(
    "case", [W4A4, replace(W4A4, n=72, k=80, shards=())], ids=["whole tiles", "filled up"]
)
@pytest.mark.parametrize("kernel", [CUTLASS, TORCH])
@pytest.mark.parametrize("make", [_compressed_tensors, _model_opt])
def test_vllm_s_own_method_builds_the_same(
    case: Case, kernel: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor import parameter

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    if kernel == TORCH:
        # vLLM would fall back to 16-bit activations before it comes to this one.
        disabled = (CUTLASS, "MarlinNvFp4LinearKernel")
        monkeypatch.setenv("VLLM_DISABLED_KERNELS", ",".join(disabled))
    problem = case.build()
    d, x = problem.descriptor, problem.activations(5)
    with process.pretending(B200), process.configured():
        method, apply, checkpoint = make(problem.own.shards[0].tensors)
        theirs = vllms_layer(method, checkpoint, d.n, d.k)
        expected = apply(theirs, x)
        ours = backend.prepare(d, problem.weights, B200)
        out = op.call(d, op.text_of(d), ours, x, None, "cuda")
    adapter = table.preferred(table.answers(d, B200))
    assert adapter is not None
    assert type(method.kernel).__name__ == adapter.kernel == kernel
    for full_name, tensor in ours.items():
        name = full_name.removeprefix(f"{adapter.tag}_")
        other = getattr(theirs, name).data
        assert tensor.dtype == other.dtype, name
        assert tensor.shape == other.shape, name
        assert tensor.stride() == other.stride(), name
        if tensor.dim():
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name
        elif make is _model_opt:
            assert torch.equal(tensor, other), name
        else:  # made of divisors in the file
            torch.testing.assert_close(tensor, other)
    torch.testing.assert_close(out, expected, atol=0, rtol=2**-7)
    for name, value in adapter.attributes(d).items():
        assert getattr(theirs, name) == value, name


def test_scales_lie_where_the_tensor_cores_read_them() -> None:
    """By the formula of NVIDIA's documentation, not by vLLM's reordering."""
    problem = replace(W4A4, n=200, k=336, shards=()).build()
    with process.pretending(B200):
        tensors = backend.prepare(problem.descriptor, problem.weights, B200)
    tiles = tensors["cutlassnvfp4_weight_scale"]
    assert tiles.shape == (256, 24)
    stored = problem.own.shards[0].tensors["scale"]
    assert torch.equal(tiles.flatten()[fp4_doubles.place(200, 21)].float(), stored.float())
    assert int((tiles.float() != 0).sum()) == int((stored.float() != 0).sum())


# --- tracing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [CUTLASS, TORCH])
@pytest.mark.parametrize("m", [1, 300])
def test_apply_on_fake_cuda_tensors(kernel: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == TORCH:
        monkeypatch.setenv("VLLM_DISABLED_KERNELS", CUTLASS)
    # N is whole tiles: a slice of a fake CUDA tensor asks for a device that is not there.
    case = replace(W4A4, n=96, k=80, shards=(64, 32), order="act", bias_dtype="bfloat16")
    problem = case.build()
    d = problem.descriptor
    with process.pretending(B200):
        tensors = backend.prepare(d, problem.weights, B200)
        tag = table.preferred(table.answers(d, B200)).tag  # type: ignore[union-attr]
        with FakeTensorMode():
            on_gpu = {
                name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                for name, t in tensors.items()
            }
            order, row_scale = (on_gpu.pop(name) for name in (op.ORDER, op.ROW_SCALE))
            own = {full.removeprefix(f"{tag}_"): tensor for full, tensor in on_gpu.items()}
            x = torch.empty(m, d.in_features, dtype=torch.bfloat16, device="cuda")
            bias = torch.empty(d.n, dtype=x.dtype, device="cuda")
            out = op.multiply(x, own, order, row_scale, bias, tag, op.text_of(d), "cuda")
    assert (out.device.type, out.shape, out.dtype) == ("cuda", (m, d.n), torch.bfloat16)
    assert "scaled_fp4_quant" in cuda_doubles.CALLED


def test_the_operator_is_well_behaved() -> None:
    problem = W4A4.build()
    d: CompressedLinearDescriptor = problem.descriptor
    with process.pretending(B200):
        tensors = backend.prepare(d, problem.weights, B200)
        own = {name.removeprefix("cutlassnvfp4_"): t for name, t in tensors.items()}
        names, text = ",".join(own), op.text_of(d)
        arguments = (problem.activations(4), list(own.values()), None, None, None, names)
        torch.library.opcheck(
            torch.ops.compressed_linear.vllm_native_linear.default,
            (*arguments, "cutlassnvfp4", text, "cuda", d.n, torch.bfloat16),
            # The check of the schema compares arguments by operators that e4m3 does not have.
            test_utils=("test_autograd_registration", "test_faketensor"),
        )


def test_prepared_bytes_are_those_of_whole_tiles() -> None:
    problem = W4A4.build()
    with process.pretending(B200):
        tensors = backend.prepare(problem.descriptor, problem.weights, B200)
    stated = VllmNativeBackend.prepared_bytes(problem.descriptor)
    large = [t for t in tensors.values() if t.dim()]
    assert stated == sum(t.nbytes for t in large)
