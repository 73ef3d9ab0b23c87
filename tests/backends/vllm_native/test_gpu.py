# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernel classes for GPUs, driven from descriptors on a machine that has no GPU.

The operators of vLLM's CUDA wheel are stood in for by ``cuda_doubles``, so that numbers can be held
against the contract.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.support import cuda_doubles
from tests.support.gpu_cases import (
    A100,
    FP8,
    FP8_TENSOR,
    FP8_TOKEN,
    FP8_W8A8,
    H100,
    INT4,
    MACHETE,
    MARLIN,
    MX,
    NVFP4,
    STATIC,
    TOKEN,
    W8A8,
    needs_classes,
    symmetric,
)
from tests.support.messages import saying, says
from tests.support.vllm_classes import assert_in_contract, check, reasons
from vllm.compressed_linear.backends.vllm_native import (
    VllmNativeBackend,
    backend,
    op,
    scaled_mm,
    table,
)
from vllm.compressed_linear.backends.vllm_native.classes import process
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import BF16, E4M3, uint
from vllm.compressed_linear.testing.oracle import Case
from vllm.compressed_linear.testing.suite import conformance_cases

pytestmark = [needs_classes, pytest.mark.usefixtures("doubles")]


CAPABILITIES = (80, 86, 89, 90, 100, 120)

# --- mixed precision -----------------------------------------------------------------------------

_MIXED = [
    *(
        replace(
            INT4,
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
    replace(INT4, element=uint(4, 7)),
    replace(INT4, scale_dtype="float32"),
    replace(INT4, bias_dtype="bfloat16"),
    replace(INT4, order="act"),
    replace(INT4, order="ragged", group=32),
    replace(INT4, order="cut"),
    replace(INT4, n=192, shards=(64, 64, 64)),
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
    case = replace(INT4, element=element, n=n, k=k, group=group, zero=zero, shards=())
    case = replace(case, bias_dtype="bfloat16")
    assert assert_in_contract(case, A100) == MARLIN


@pytest.mark.parametrize("group", [64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_hopper_gets_machete(group: int, bits: int, dtype: str) -> None:
    case = replace(
        INT4,
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
        replace(INT4, element=uint(4), zero="integer"),
        replace(INT4, n=64, shards=()),
        replace(INT4, group=32),
        replace(INT4, element=uint(4, 3)),
    ],
    ids=str,
)
def test_what_machete_cannot_goes_to_marlin(case: Case) -> None:
    assert assert_in_contract(case, H100) == MARLIN


def test_a_wrong_code_breaks_the_bound() -> None:
    """The tests above can fail: one code of a group is seen."""
    problem = INT4.build()
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
    d = INT4.build().descriptor
    platform = Platform.parse(f"cuda:{capability}")
    assert VllmNativeBackend.variant(d, platform) == (MACHETE if capability == 90 else MARLIN)
    asked = {answer.kernel: answer for answer in table.answers(d, platform)}
    assert "fp16" in asked["ExllamaLinearKernel"].reasons[0]
    assert "quantizes x" in asked["CutlassW4A8LinearKernel"].reasons[0]
    assert "humming" in asked["HummingLinearKernel"].reasons[0]


def test_every_reason_is_given_by_the_class_that_has_it() -> None:
    text = reasons(replace(INT4, element=uint(8), zero="integer").build().descriptor, H100)
    assert says(text, "MacheteLinearKernel", "zero points")
    assert "MarlinLinearKernel: Quant type (uint8) not supported" in text
    text = reasons(replace(INT4, group=16).build().descriptor, A100)
    assert "Group size (16) not supported" in text
    assert says(text, "compute capability", 90, 80)
    half = replace(INT4, input_dtype="float16", scale_dtype="float32", output_dtype="")
    assert says(reasons(half.build().descriptor, A100), "scale", "float32", "float16")
    three = replace(INT4, element=symmetric(3))
    assert says(reasons(three.build().descriptor, A100), "3-bit", "integer", 4, 8)


def test_an_operator_that_was_not_built_is_a_reason() -> None:
    bare = replace(A100, ops=frozenset())
    d = replace(INT4, element=symmetric(8)).build().descriptor
    assert says(reasons(d, bare), "MarlinLinearKernel", "_C::gptq_marlin_repack")


def test_vllms_own_switch_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", MACHETE)
    assert VllmNativeBackend.variant(INT4.build().descriptor, H100) == MARLIN


def test_a_scale_that_16_bits_cannot_hold_stops_the_load() -> None:
    problem = replace(INT4, input_dtype="float16", scale_dtype="float16", output_dtype="").build()
    problem.weights.shards[0].tensors["scale"][3, 1] = 60000.0
    with (
        process.pretending(A100),
        pytest.raises(ValueError, match=saying("scale", 60000)),
    ):
        backend.prepare(problem.descriptor, problem.weights, A100)


# --- fp8 and fp4 weights, and weights that are not quantized --------------------------------------

_HALF = {"input_dtype": "float16", "output_dtype": ""}


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        *(
            (replace(FP8, **change), "MarlinFP8ScaledMMLinearKernel")
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
            (replace(NVFP4, **change), "MarlinNvFp4LinearKernel")
            for change in (
                {},
                _HALF,
                {"row_scale": "row"},
                {"n": 72, "k": 96, "shards": (), "bias_dtype": "bfloat16"},
            )
        ),
        *(
            (replace(MX, **change), kernel)
            for change in ({}, {"n": 72, "k": 96, "shards": ()}, {"bias_dtype": "bfloat16"})
            for kernel in ("MarlinMxFp4LinearKernel",)
        ),
        *(
            (replace(MX, element=E4M3, **change), "MarlinMxfp8LinearKernel")
            for change in ({}, {"n": 72, "k": 96, "shards": ()})
        ),
        (Case(BF16, 40, 96), "torch linear"),
        (Case(BF16, 40, 96, bias_dtype="bfloat16"), "torch linear"),
    ],
    ids=str,
)
def test_other_weights_are_in_the_contract(case: Case, kernel: str) -> None:
    assert assert_in_contract(case, A100) == kernel


@pytest.mark.parametrize(
    ("case", "tensor"),
    [(FP8, "marlinfp8_weight"), (NVFP4, "marlinnvfp4_weight"), (MX, "marlinmxfp4_weight")],
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


# --- 8-bit weights and activations ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "bias"),
    [
        (TOKEN, None),
        (STATIC, None),
        (replace(STATIC, symmetric=False), None),
        (replace(STATIC, symmetric=False), "bfloat16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [-1, 0])
def test_int8_is_in_the_contract_on_cutlass(
    activation: ActivationSpec, bias: str | None, group: int
) -> None:
    case = replace(W8A8, group=group, activation=activation, bias_dtype=bias)
    assert assert_in_contract(case, A100) == "CutlassInt8ScaledMMLinearKernel"


@pytest.mark.parametrize(
    "activation", [FP8_TOKEN, FP8_TENSOR, replace(FP8_TENSOR, dynamic=False)], ids=str
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fp8_is_in_the_contract_on_cutlass(activation: ActivationSpec, dtype: str) -> None:
    case = replace(FP8_W8A8, activation=activation, input_dtype=dtype, output_dtype="")
    assert assert_in_contract(case, H100) == "CutlassFP8ScaledMMLinearKernel"


def test_activations_that_vllm_quantizes_otherwise_are_declined() -> None:
    half = replace(W8A8, activation=replace(TOKEN, maximum=127.5)).build().descriptor
    assert says(reasons(half, A100), 127, 127.5)
    asymmetric = replace(W8A8, activation=replace(TOKEN, symmetric=False)).build().descriptor
    assert "activations as int8 dynamic per token, asymmetric" in reasons(asymmetric, A100)
    grouped = replace(W8A8, group=64).build().descriptor
    assert says(reasons(grouped, A100), "groups of 64", "channel")
    fp8 = FP8_W8A8.build().descriptor
    assert "CUTLASS FP8 kernels not available" in reasons(replace(fp8, activation=FP8_TOKEN), A100)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_int8_has_no_cutlass_on_blackwell(capability: int) -> None:
    platform = Platform.parse(f"cuda:{capability}")
    kernel = VllmNativeBackend.variant(W8A8.build().descriptor, platform)
    tool = "Cutlass" if capability <= 90 else "Triton"
    assert kernel == f"{tool}Int8ScaledMMLinearKernel"


def test_slack_is_for_ties_and_nothing_else() -> None:
    x = torch.tensor([[127.0, 2.5, 2.4, -3.5, 0.0]])
    found = scaled_mm.slack(TOKEN, x, None, None)
    assert found[0, [1, 3]].tolist() == pytest.approx([1, 1], rel=1e-4)
    assert float(found[0, [2, 4]].max()) < 1e-4


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
