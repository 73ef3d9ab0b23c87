# SPDX-License-Identifier: Apache-2.0
"""fp8 weights with a scale for each 128×128 on vLLM's kernel classes, on a machine without a GPU.

As in ``test_gpu``: stand-ins for the operators, and vLLM's own linear methods as what
the prepared tensors are held against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import cuda_doubles
from tests.support.cuda_checks import expect, on, unreal
from tests.support.cutlass_doubles import block_scaled_product
from tests.support.messages import says
from tests.support.vllm_classes import BLOCKS, GROUPS, assert_in_contract, check, reasons
from vllm.compressed_linear.backends.registry import select
from vllm.compressed_linear.backends.vllm_native import (
    VllmNativeBackend,
    backend,
    declined,
    op,
    scaled_mm,
    table,
)
from vllm.compressed_linear.backends.vllm_native.classes import process, tables
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.testing.oracle import Case

A100, L40S, H100 = (Platform.parse(f"cuda:{capability}") for capability in (80, 89, 90))
on_both = pytest.mark.parametrize("platform", [L40S, H100], ids=["cuda:89", "cuda:90"])
"""vLLM's Triton class and its CUTLASS class."""

CUTLASS, TRITON = "CutlassFp8BlockScaledMMKernel", "TritonFp8BlockScaledMMKernel"
MARLIN = "MarlinFP8ScaledMMLinearKernel"

pytestmark = pytest.mark.skipif(
    tables.unavailable("fp8 blocks") is not None,
    reason="this vLLM has no kernel classes that are known here",
)


def triton_block_scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    block_size: list[int],
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """In the place of the function that starts vLLM's Triton kernel."""
    (m, k), n = a.shape, b.shape[0]
    expect(list(block_size) == [128, 128], f"blocks of {block_size}")
    expect(a.dtype == b.dtype == torch.float8_e4m3fn, f"{a.dtype} with {b.dtype}")
    expect(a.is_contiguous() and b.shape == (n, k), "operands")
    expect(a_scales.shape == (m, -(-k // 128)), f"a scales {a_scales.shape}")
    expect(b_scales.shape == (-(-n // 128), -(-k // 128)), f"b scales {b_scales.shape}")
    expect(a_scales.dtype == b_scales.dtype == torch.float32, "scales")
    on(a.device, b, a_scales, b_scales)
    cuda_doubles.CALLED.append("triton")
    if unreal(a):
        return a.new_empty(m, n, dtype=output_dtype)
    return block_scaled_product(a, b, a_scales, b_scales).to(output_dtype)


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # vLLM registers this operator for the device of the process only.
    monkeypatch.setattr(torch.ops.vllm, "w8a8_triton_block_scaled_mm_func", triton_block_scaled_mm)
    cuda_doubles.install()
    cuda_doubles.CALLED.clear()
    op.ready.cache_clear()
    yield
    op.ready.cache_clear()


def answers(d: CompressedLinearDescriptor, platform: Platform) -> dict[str, str]:
    return {answer.kernel: "; ".join(answer.reasons) for answer in table.answers(d, platform)}


_SMALL = replace(BLOCKS, n=160, shards=())
_CASES = [
    BLOCKS,
    replace(BLOCKS, n=16, k=128, shards=()),
    replace(BLOCKS, k=384, shards=(256, 128)),
    replace(BLOCKS, n=288, shards=(128, 160), bias_dtype="bfloat16"),
    replace(_SMALL, scale_dtype="bfloat16"),
    replace(_SMALL, scale_dtype="e8m0"),
    replace(_SMALL, input_dtype="float16", output_dtype="", bias_dtype="float16"),
    *(replace(_SMALL, data=data) for data in ("signed", "largest", "tiny", "spread", "dead")),
]


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_results_are_in_the_contract_on_cutlass(case: Case) -> None:
    assert assert_in_contract(case, H100, rows=(1, 65)) == CUTLASS
    called = tuple(cuda_doubles.CALLED)
    assert called == ("per_token_group_fp8_quant", "cutlass_scaled_mm") * 2


@pytest.mark.parametrize("case", _CASES[:5], ids=str)
def test_results_are_in_the_contract_on_triton(case: Case) -> None:
    assert assert_in_contract(case, L40S, rows=(1, 65)) == TRITON
    assert tuple(cuda_doubles.CALLED) == ("per_token_group_fp8_quant", "triton") * 2


@pytest.mark.parametrize(
    ("capability", "kernel"), [(89, TRITON), (90, CUTLASS), (100, CUTLASS), (120, CUTLASS)]
)
def test_the_plan_names_vllms_class(capability: int, kernel: str) -> None:
    found = select(BLOCKS.build().descriptor, Platform.parse(f"cuda:{capability}"))
    assert (found.chosen.name, found.variant) == ("vllm_native", kernel)


def test_what_cutlass_cannot_goes_to_triton() -> None:
    case = replace(BLOCKS, n=72, shards=(), bias_dtype="bfloat16")
    assert assert_in_contract(case, H100) == TRITON
    assert says(answers(case.build().descriptor, H100)[CUTLASS], "N=72", 16)


def test_every_class_says_why_it_does_not_run() -> None:
    d = BLOCKS.build().descriptor
    found = answers(d, L40S)
    assert "within FlashInfer up to 31 tokens" in found.pop(
        "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"
    )
    assert "quantizes the weights anew" in found.pop("DeepGemmFp8BlockScaledMMKernel")
    assert "capability" in found.pop(CUTLASS)
    assert "takes x as it is" in found.pop(MARLIN)
    assert found.pop(TRITON) == ""
    assert {name: declined.why(name) for name in found} == found
    assert says(answers(d, A100)[TRITON], "compute capability", 80, 89)
    assert "aiter" in reasons(d, Platform.parse("rocm"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shards": (192, 192)}, "a scale for each row in groups of 128 (supported: blocks of"),
        ({"block_rows": 1}, "a scale for each row in groups of 128 (supported: blocks of"),
        ({"group": -1, "block_rows": 1}, "a scale for each row in groups of 256 (supported:"),
        ({"block_rows": 64}, "blocks of 64x128 (supported: blocks of 128x128)"),
        ({"group": 64}, "blocks of 128x64 (supported: blocks of 128x128)"),
        ({"k": 320}, "blocks of 128x64 (supported: blocks of 128x128)"),
        ({"order": "cut"}, "blocks of 128x64 (supported: blocks of 128x128)"),
        ({"activation": replace(GROUPS, group_size=64)}, "x in groups of 64 (supported: 128)"),
        ({"activation": replace(GROUPS, maximum=240.0)}, "max|x| falls on 448, the descriptor has"),
        ({"row_scale": "tensor"}, "second-level scales"),
    ],
    ids=str,
)
def test_what_is_computed_otherwise_is_declined(change: dict[str, Any], reason: str) -> None:
    case = replace(BLOCKS, **{"shards": (), **change})
    for platform in (L40S, H100):
        text = reasons(case.build().descriptor, platform)
        for kernel in (CUTLASS, TRITON):
            assert f"{kernel}: " in text
        assert reason in text


def test_a_wrong_scale_of_a_block_breaks_the_bound() -> None:
    """The tests above can fail: one scale of six is seen."""
    problem = BLOCKS.build()
    d = problem.descriptor
    with process.pretending(H100):
        tensors = backend.prepare(d, problem.weights, H100)
        tensors["cutlassfp8block_weight_scale"][1, 0] *= 1.01
        x = problem.activations(3)
        out = op.call(d, op.text_of(d), tensors, x, None, "cuda")
    with pytest.raises(AssertionError, match="times the error allowed"):
        check(problem, x, out, VllmNativeBackend)


def test_slack_of_groups_is_for_ties_and_for_tiny_groups() -> None:
    x = torch.zeros(1, 256)
    # 17 lies between the codes 16 and 18.
    x[0, :4] = torch.tensor([448.0, 17.0, 17.5, 0.0])
    x[0, 128:130] = torch.tensor([5e-11, 1e-12])
    found = scaled_mm.slack(GROUPS, x, None, None)
    assert float(found[0, 1]) == pytest.approx(2, rel=1e-3)
    assert float(found[0, 2:128].max()) < 1e-4
    scale = 1e-10 / 448
    for channel in (128, 129):
        theirs = (x[0, channel] / scale).to(torch.float8_e4m3fn).float() * scale
        assert float((theirs - x[0, channel]).abs()) <= float(found[0, channel])


# --- what vLLM's own methods would have built ----------------------------------------------------


def _fp8_method() -> tuple[Any, str]:
    """The method for checkpoints as DeepSeek and Qwen publish them."""
    from vllm.model_executor.layers.quantization import fp8

    config = fp8.Fp8Config(
        is_checkpoint_fp8_serialized=True,
        activation_scheme="dynamic",
        weight_block_size=[128, 128],
    )
    return fp8.Fp8LinearMethod(config), "weight_scale_inv"


def _compressed_tensors_method(name: str) -> Any:
    def make() -> tuple[Any, str]:
        from compressed_tensors.quantization import QuantizationArgs
        from vllm.model_executor.layers.quantization.compressed_tensors import schemes

        weights = QuantizationArgs(
            num_bits=8,
            type="float",
            strategy="block",
            symmetric=True,
            block_structure=[128, 128],
        )
        return getattr(schemes, name)(weights, False), "weight_scale"

    return make


_BY_VLLM = {
    "fp8": _fp8_method,
    "compressed-tensors": _compressed_tensors_method("CompressedTensorsW8A8Fp8"),
    "compressed-tensors, x as it is": _compressed_tensors_method("CompressedTensorsW8A16Fp8"),
}


@pytest.mark.parametrize("name", _BY_VLLM)
@pytest.mark.parametrize("shards", [(384,), (128, 160)], ids=str)
@on_both
def test_vllms_own_method_builds_the_same(
    name: str, shards: tuple[int, ...], platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor import parameter
    from vllm.model_executor.layers.quantization import fp8
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8,
        compressed_tensors_w8a16_fp8,
    )

    from vllm import distributed

    weights_only = name.endswith("as it is")
    for module in (parameter, distributed):
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    for module in (fp8, compressed_tensors_w8a8_fp8, compressed_tensors_w8a16_fp8):
        monkeypatch.setattr(module, "get_current_vllm_config", lambda: config)
    if not weights_only:
        # vLLM would take it on Lovelace, and leave x as it is.
        monkeypatch.setenv("VLLM_DISABLED_KERNELS", MARLIN)
    activation = None if weights_only else GROUPS
    problem = replace(BLOCKS, n=sum(shards), shards=shards, activation=activation).build()
    d = problem.descriptor
    stored = [shard.tensors for shard in problem.own.shards]
    with (
        process.pretending(platform),
        process.configured(),
        process.default_dtype(torch.bfloat16),
    ):
        method, scale_name = _BY_VLLM[name]()
        theirs = torch.nn.Module()
        method.create_weights(
            layer=theirs,
            output_partition_sizes=list(shards),
            input_size_per_partition=d.k,
            input_size=d.k,
            output_size=d.n,
            params_dtype=torch.bfloat16,
            weight_loader=lambda *_: None,
        )
        codes = torch.cat([tensors["codes"].view(torch.float8_e4m3fn) for tensors in stored])
        theirs.get_parameter("weight").data.copy_(codes)
        scale = torch.cat([tensors["scale"] for tensors in stored])
        theirs.get_parameter(scale_name).data.copy_(scale)
        method.process_weights_after_loading(theirs)
        ours = backend.prepare(d, problem.weights, platform)
    adapter = table.preferred(table.answers(d, platform))
    assert adapter is not None
    kernel = getattr(method, "fp8_linear", None) or method.linear_kernel
    assert type(kernel).__name__ == adapter.kernel
    known = dict(theirs.named_parameters())
    # compressed-tensors renames it on the way for weights only.
    if "weight_scale_inv" in known:
        known["weight_scale"] = known.pop("weight_scale_inv")
    assert ours.keys() == {f"{adapter.tag}_weight", f"{adapter.tag}_weight_scale"}
    for full_name, tensor in ours.items():
        other = known[full_name.removeprefix(f"{adapter.tag}_")].data
        assert tensor.dtype == other.dtype, full_name
        assert tensor.shape == other.shape, full_name
        assert tensor.stride() == other.stride(), full_name
        raw = [t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (tensor, other)]
        assert torch.equal(*raw), full_name


@pytest.mark.parametrize("m", [1, 300])
@on_both
def test_apply_on_fake_cuda_tensors(platform: Platform, m: int) -> None:
    """Every tensor that reaches an operator is on the GPU and has the shape it asks for."""
    problem = replace(BLOCKS, n=160, shards=(), bias_dtype="bfloat16").build()
    d = problem.descriptor
    with process.pretending(platform):
        tensors = backend.prepare(d, problem.weights, platform)
        adapter = table.preferred(table.answers(d, platform))
        assert adapter is not None
        with FakeTensorMode():
            own = {
                name.removeprefix(f"{adapter.tag}_"): torch.empty_strided(
                    t.shape, t.stride(), dtype=t.dtype, device="cuda"
                )
                for name, t in tensors.items()
            }
            x = torch.empty(m, d.k, dtype=torch.bfloat16, device="cuda")
            bias = torch.empty(d.n, dtype=x.dtype, device="cuda")
            out = op.multiply(x, own, None, None, bias, adapter.tag, op.text_of(d), "cuda")
    assert (out.device.type, out.shape, out.dtype) == ("cuda", (m, d.n), torch.bfloat16)
    assert cuda_doubles.CALLED[0] == "per_token_group_fp8_quant"
