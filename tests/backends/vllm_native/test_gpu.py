# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernel classes for GPUs, driven from descriptors on a machine that has no GPU.

The operators of vLLM's CUDA wheel are stood in for by ``cuda_doubles``, so that numbers can be held
against the contract; what the adapter hands to vLLM is held against what vLLM's own linear methods
make of the same weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import cuda_doubles
from tests.support.messages import saying, says
from tests.support.vllm_classes import assert_in_contract, check, reasons, vllms_layer
from vllm.compressed_linear.backends.vllm_native import (
    VllmNativeBackend,
    backend,
    op,
    scaled_mm,
    table,
)
from vllm.compressed_linear.backends.vllm_native.classes import process, tables
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.machine.vllm_wheel import CUDA_OPS
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import BF16, E2M1, E4M3, INT8, uint
from vllm.compressed_linear.spec.packing import Packing, pack, unpack
from vllm.compressed_linear.testing.oracle import Case
from vllm.compressed_linear.testing.suite import conformance_cases

CAPABILITIES = (80, 86, 89, 90, 100, 120)
A100, H100 = Platform.parse("cuda:80"), Platform.parse("cuda:90")

pytestmark = pytest.mark.skipif(
    tables.unavailable("mixed precision") is not None,
    reason="this vLLM has no kernel classes that are known here",
)


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    cuda_doubles.install()
    cuda_doubles.CALLED.clear()
    op.ready.cache_clear()
    yield
    op.ready.cache_clear()


def symmetric(bits: int) -> Any:
    return uint(bits, 1 << (bits - 1))


# --- mixed precision -----------------------------------------------------------------------------

MARLIN, MACHETE = "MarlinLinearKernel", "MacheteLinearKernel"
_INT4 = Case(symmetric(4), 128, 256, 128, scale_dtype="bfloat16")
_MIXED = [
    *(
        replace(
            _INT4,
            element=element,
            zero=zero,
            group=group,
            input_dtype=dtype,
            scale_dtype=dtype,
            output_dtype="",
        )
        for (element, zero), group, dtype in itertools.product(
            ((symmetric(4), None), (uint(4), "integer"), (symmetric(8), None)),
            (32, 64, 128, -1),
            ("bfloat16", "float16"),
        )
    ),
    replace(_INT4, element=uint(4, 7)),
    replace(_INT4, scale_dtype="float32"),
    replace(_INT4, bias_dtype="bfloat16"),
    replace(_INT4, order="act"),
    replace(_INT4, order="ragged", group=32),
    replace(_INT4, order="cut"),
    replace(_INT4, n=192, shards=(64, 64, 64)),
]


@pytest.mark.parametrize("case", _MIXED, ids=str)
def test_mixed_precision_is_in_the_contract_on_marlin(case: Case) -> None:
    assert assert_in_contract(case, A100) == MARLIN
    assert "marlin_gemm" in cuda_doubles.CALLED


@pytest.mark.parametrize(
    ("n", "k", "group"), [(72, 128, 32), (40, 96, 32), (136, 320, 64), (64, 64, -1), (8, 16, -1)]
)
@pytest.mark.parametrize("zero", [None, "integer"])
def test_shapes_that_are_no_whole_tiles_are_filled_up(
    n: int, k: int, group: int, zero: str | None
) -> None:
    element = symmetric(4) if zero is None else uint(4)
    case = replace(_INT4, element=element, n=n, k=k, group=group, zero=zero, shards=())
    case = replace(case, bias_dtype="bfloat16")
    assert assert_in_contract(case, A100) == MARLIN


@pytest.mark.parametrize("group", [64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hopper_gets_machete(group: int, bits: int, dtype: str) -> None:
    case = replace(
        _INT4,
        element=symmetric(bits),
        group=group,
        input_dtype=dtype,
        scale_dtype=dtype,
        output_dtype="",
    )
    assert assert_in_contract(case, H100) == MACHETE
    assert {"machete_prepack_B", "machete_mm"} <= set(cuda_doubles.CALLED)


@pytest.mark.parametrize(
    "case",
    [
        replace(_INT4, element=uint(4), zero="integer"),
        replace(_INT4, n=64, shards=()),
        replace(_INT4, group=32),
        replace(_INT4, element=uint(4, 3)),
    ],
    ids=str,
)
def test_what_machete_cannot_goes_to_marlin(case: Case) -> None:
    assert assert_in_contract(case, H100) == MARLIN


def test_a_wrong_code_breaks_the_bound() -> None:
    """The tests above can fail: one code of a group is seen."""
    problem = _INT4.build()
    d = problem.descriptor
    with process.pretending(A100):
        tensors = backend.prepare(d, problem.weights, A100)
        tensors["marlin_weight_packed"][3, 5] ^= 1 << 7
        x = torch.eye(256)[:, :].bfloat16()
        out = op.call(d, op.text_of(d), tensors, x, None, "cuda")
    with pytest.raises(AssertionError, match="times the error allowed"):
        check(problem, x, out, VllmNativeBackend)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_capability_runs_4_bits(capability: int) -> None:
    d = _INT4.build().descriptor
    platform = Platform.parse(f"cuda:{capability}")
    assert VllmNativeBackend.variant(d, platform) == (MACHETE if capability == 90 else MARLIN)
    asked = {answer.kernel: answer for answer in table.answers(d, platform)}
    assert "fp16" in asked["ExllamaLinearKernel"].reasons[0]
    assert "quantizes x" in asked["CutlassW4A8LinearKernel"].reasons[0]
    assert "humming" in asked["HummingLinearKernel"].reasons[0]


def test_every_reason_is_given_by_the_class_that_has_it() -> None:
    text = reasons(replace(_INT4, element=uint(8), zero="integer").build().descriptor, H100)
    assert says(text, "MacheteLinearKernel", "zero points")
    assert "MarlinLinearKernel: Quant type (uint8) not supported" in text
    text = reasons(replace(_INT4, group=16).build().descriptor, A100)
    assert "Group size (16) not supported" in text
    assert says(text, "compute capability", 90, 80)
    half = replace(_INT4, input_dtype="float16", scale_dtype="float32", output_dtype="")
    assert says(reasons(half.build().descriptor, A100), "scale", "float32", "float16")
    three = replace(_INT4, element=symmetric(3))
    assert says(reasons(three.build().descriptor, A100), "3-bit", "integer", 4, 8)


def test_an_operator_that_was_not_built_is_a_reason() -> None:
    bare = replace(A100, ops=frozenset())
    d = replace(_INT4, element=symmetric(8)).build().descriptor
    assert says(reasons(d, bare), "MarlinLinearKernel", "_C::gptq_marlin_repack")


def test_vllms_own_switch_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", MACHETE)
    assert VllmNativeBackend.variant(_INT4.build().descriptor, H100) == MARLIN


def test_a_scale_that_16_bits_cannot_hold_stops_the_load() -> None:
    problem = replace(_INT4, input_dtype="float16", scale_dtype="float16", output_dtype="").build()
    problem.weights.shards[0].tensors["scale"][3, 1] = 60000.0
    with (
        process.pretending(A100),
        pytest.raises(ValueError, match=saying("scale", 60000)),
    ):
        backend.prepare(problem.descriptor, problem.weights, A100)


# --- fp8 and fp4 weights, and weights that are not quantized --------------------------------------

_FP8 = Case(E4M3, 128, 256, -1, scale_dtype="float32")
_NVFP4 = Case(E2M1, 128, 256, 16, scale_dtype="float8_e4m3fn", row_scale="tensor")
_MX = Case(E2M1, 128, 256, 32, scale_dtype="e8m0")
_HALF = {"input_dtype": "float16", "output_dtype": ""}


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        *(
            (replace(_FP8, **change), "MarlinFP8ScaledMMLinearKernel")
            for change in (
                {},
                {"group": 0},
                {"group": 128},
                {"group": 128, "scale_dtype": "bfloat16"},
                {"scale_dtype": "float16", **_HALF},
                {"group": 128, "scale_dtype": "float16", **_HALF},
                {"n": 72, "k": 128, "shards": (), "bias_dtype": "bfloat16"},
                {"order": "act", "group": 128},
            )
        ),
        *(
            (replace(_NVFP4, **change), "MarlinNvFp4LinearKernel")
            for change in (
                {},
                _HALF,
                {"row_scale": "row"},
                {"n": 72, "k": 96, "shards": (), "bias_dtype": "bfloat16"},
            )
        ),
        *(
            (replace(_MX, **change), kernel)
            for change in ({}, {"n": 72, "k": 96, "shards": ()}, {"bias_dtype": "bfloat16"})
            for kernel in ("MarlinMxFp4LinearKernel",)
        ),
        *(
            (replace(_MX, element=E4M3, **change), "MarlinMxfp8LinearKernel")
            for change in ({}, {"n": 72, "k": 96, "shards": ()})
        ),
        (Case(BF16, 40, 96), "torch linear"),
        (Case(BF16, 40, 96, bias_dtype="bfloat16"), "torch linear"),
    ],
    ids=str,
)
def test_other_weights_are_in_the_contract(case: Case, kernel: str) -> None:
    assert assert_in_contract(case, A100) == kernel


# --- 8-bit weights and activations ---------------------------------------------------------------

_TOKEN = ActivationSpec(INT8, True, "token")
_STATIC = replace(_TOKEN, dynamic=False, granularity="tensor")
_FP8_TOKEN = ActivationSpec(E4M3, True, "token", maximum=448.0)
_FP8_TENSOR = replace(_FP8_TOKEN, granularity="tensor")
_W8A8 = Case(symmetric(8), 128, 256, -1, scale_dtype="float32", activation=_TOKEN)
_FP8_W8A8 = replace(_W8A8, element=E4M3)


@pytest.mark.parametrize(
    ("activation", "bias"),
    [
        (_TOKEN, None),
        (_STATIC, None),
        (replace(_STATIC, symmetric=False), None),
        (replace(_STATIC, symmetric=False), "bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [-1, 0])
def test_int8_is_in_the_contract_on_cutlass(
    activation: ActivationSpec, bias: str | None, group: int
) -> None:
    case = replace(_W8A8, group=group, activation=activation, bias_dtype=bias)
    assert assert_in_contract(case, A100) == "CutlassInt8ScaledMMLinearKernel"


@pytest.mark.parametrize(
    "activation", [_FP8_TOKEN, _FP8_TENSOR, replace(_FP8_TENSOR, dynamic=False)], ids=str
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fp8_is_in_the_contract_on_cutlass(activation: ActivationSpec, dtype: str) -> None:
    case = replace(_FP8_W8A8, activation=activation, input_dtype=dtype, output_dtype="")
    assert assert_in_contract(case, H100) == "CutlassFP8ScaledMMLinearKernel"


def test_activations_that_vllm_quantizes_otherwise_are_declined() -> None:
    half = replace(_W8A8, activation=replace(_TOKEN, maximum=127.5)).build().descriptor
    assert says(reasons(half, A100), 127, 127.5)
    asymmetric = replace(_W8A8, activation=replace(_TOKEN, symmetric=False)).build().descriptor
    assert "activations as int8 dynamic per token, asymmetric" in reasons(asymmetric, A100)
    grouped = replace(_W8A8, group=64).build().descriptor
    assert says(reasons(grouped, A100), "groups of 64", "channel")
    fp8 = _FP8_W8A8.build().descriptor
    assert "CUTLASS FP8 kernels not available" in reasons(replace(fp8, activation=_FP8_TOKEN), A100)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_int8_has_no_cutlass_on_blackwell(capability: int) -> None:
    platform = Platform.parse(f"cuda:{capability}")
    kernel = VllmNativeBackend.variant(_W8A8.build().descriptor, platform)
    tool = "Cutlass" if capability <= 90 else "Triton"
    assert kernel == f"{tool}Int8ScaledMMLinearKernel"


def test_slack_is_for_ties_and_nothing_else() -> None:
    x = torch.tensor([[127.0, 2.5, 2.4, -3.5, 0.0]])
    found = scaled_mm.slack(_TOKEN, x, None, None)
    assert found[0, [1, 3]].tolist() == pytest.approx([1, 1], rel=1e-4)
    assert float(found[0, [2, 4]].max()) < 1e-4


# --- what vLLM's own methods would have built ----------------------------------------------------


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
    problem = replace(_INT4, element=element, zero=zero, group=group).build()
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
_PLAIN_BF16 = replace(_INT4, group=128)


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
    "int8 per token": (_W8A8, A100, _int8_method),
    "int8 static": (replace(_W8A8, activation=_STATIC), A100, _int8_method),
    "fp8 weights": (_FP8, A100, _fp8_method("CompressedTensorsW8A16Fp8")),
    "fp8": (
        replace(_FP8_W8A8, activation=_FP8_TOKEN),
        H100,
        _fp8_method("CompressedTensorsW8A8Fp8"),
    ),
    "NVFP4": (_NVFP4, A100, _nvfp4_method),
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


@pytest.mark.parametrize(
    ("case", "tensor"),
    [(_FP8, "marlinfp8_weight"), (_NVFP4, "marlinnvfp4_weight"), (_MX, "marlinmxfp4_weight")],
    ids=str,
)
def test_a_wrong_code_of_a_float_breaks_the_bound(case: Case, tensor: str) -> None:
    problem = case.build()
    d = problem.descriptor
    with process.pretending(A100):
        tensors = backend.prepare(d, problem.weights, A100)
        tensors[tensor][3, 5] ^= 1 << 7
        x = torch.eye(256).bfloat16()
        out = op.call(d, op.text_of(d), tensors, x, None, "cuda")
    with pytest.raises(AssertionError, match="times the error allowed"):
        check(problem, x, out, VllmNativeBackend)


# --- fake CUDA tensors ---------------------------------------------------------------------------


_FAKED = {
    "int4": (replace(_INT4, order="act", group=64), A100),
    "int4 on Hopper": (replace(_INT4, order="act", group=64), H100),
    "int8": (_W8A8, A100),
    "int8 static, asymmetric": (
        replace(_W8A8, activation=replace(_STATIC, symmetric=False)),
        A100,
    ),
    "fp8": (replace(_FP8_W8A8, activation=_FP8_TOKEN), H100),
    "fp8 weights": (_FP8, A100),
    "NVFP4": (replace(_NVFP4, row_scale="row"), A100),
    "MXFP8": (replace(_MX, element=E4M3), A100),
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
    problem = replace(_INT4, bias_dtype="bfloat16").build()
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
    problem = replace(_INT4, bias_dtype="bfloat16").build()
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


# --- the conformance kit's cases -----------------------------------------------------------------

_NEEDS_TRITON = {"TritonW4A16LinearKernel", "TritonInt8ScaledMMLinearKernel"}


def _accepted(platform: Platform) -> list[Case]:
    """The kit's cases that a class takes whose operators have a double."""
    found = []
    for case in conformance_cases():
        d = case.build().descriptor
        if not VllmNativeBackend.can_implement(d, platform):
            continue
        if VllmNativeBackend.variant(d, platform) not in _NEEDS_TRITON:
            found.append(case)
    return found


@pytest.mark.parametrize("platform", [A100, H100], ids=lambda p: p.name)
def test_the_kits_cases_are_in_the_contract(platform: Platform) -> None:
    cases = _accepted(platform)
    assert len(cases) >= 30
    stopped = []
    for case in cases:
        try:
            assert_in_contract(case, platform, rows=(1, 17))
        except ValueError as error:
            # Known, and said before anything is computed: a format of scales with a shorter range.
            if "would take for 0" not in str(error):
                raise
            stopped.append(case)
    assert {case.scale_dtype for case in stopped} <= {"float8_e4m3fn"}
    assert len(stopped) < len([c for c in cases if c.scale_dtype == "float8_e4m3fn"])
