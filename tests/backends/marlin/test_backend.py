# SPDX-License-Identifier: Apache-2.0
"""The Marlin backend from a checkpoint's tensors to y, its kernels' source run by the emulator and
held to the conformance kit; and what it declines on which machine."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support import emulated_ops
from tests.support.messages import saying
from vllm.compressed_linear.backends.marlin.backend import MarlinBackend
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.elements import BF16, E2M1, E4M3, E5M2, ElementType, uint
from vllm.compressed_linear.testing import Case, check_case

CODEBOOK = ElementType("halves", 4, codebook=tuple(i / 2 - 3.5 for i in range(16)))
ROUNDED = ElementType("thirds", 4, codebook=tuple((i - 8) / 3 for i in range(16)))
A100 = Platform.parse("cuda:80")


class EmulatedMarlin(MarlinBackend):
    """The backend where its kernels are emulated, which is slow and no place for users."""

    name = "marlin_emulated"
    capabilities = replace(MarlinBackend.capabilities, devices=frozenset({"cpu"}))


@pytest.fixture(scope="module", autouse=True)
def _emulated() -> None:
    emulated_ops.load()


def case(element: ElementType, **changes: object) -> Case:
    return Case(element, **{"n": 128, **changes})  # type: ignore[arg-type]


COMPUTED = [
    case(uint(4, 8), group=128),
    case(uint(4, 8), group=32, input_dtype="float16", scale_dtype="float16"),
    case(uint(4, 8), group=-1, bias_dtype="bfloat16", output_dtype="float32"),
    case(uint(4, 8), group=64, order="act", shards=(64, 128, 64), n=256),
    case(uint(4, 8), group=32, order="cut"),
    case(uint(4), group=32, zero="integer", data="dead"),
    case(uint(4), group=-1, zero="integer", input_dtype="float16", scale_dtype="float32"),
    case(uint(8), group=32, zero="integer"),
    case(uint(8, 128), group=64, data="signed", k=320),
    case(uint(8, 128), group=0, input_dtype="float16", data="largest"),
    case(E4M3, group=-1, scale_dtype="float32", k=208),
    case(E4M3, group=64, block_rows=32, scale_dtype="float32", input_dtype="float16"),
    case(E2M1, group=16, scale_dtype="float8_e4m3fn", row_scale="tensor", bias_dtype="float32"),
    case(E2M1, group=32, scale_dtype="e8m0", input_dtype="float16"),
    case(CODEBOOK, group=64),
    case(ROUNDED, group=64, input_dtype="float16"),
]


@pytest.mark.parametrize("case", COMPUTED, ids=str)
def test_conformance(case: Case) -> None:
    result = check_case(EmulatedMarlin, case, rows=(0, 1, 3, 16, 17, 33))
    assert result.outcome == "passed", result


def test_conformance_compiled() -> None:
    result = check_case(EmulatedMarlin, COMPUTED[0], rows=(2,), compiled=True)
    assert result.outcome == "passed", result


@pytest.mark.parametrize(
    ("declined", "reason"),
    [
        (case(uint(4, 8), n=96), "96 output channels (supported: multiples of 64)"),
        (case(uint(4, 8), k=136, group=-1), "136 input channels (supported: multiples of 16)"),
        (case(uint(4, 8), k=240, group=48), "groups of 48 channels"),
        (case(uint(4, 8), group=16, order="ragged"), "groups of 27 channels"),
        (case(uint(3, 4)), "3-bit integer weights (supported bits: 4, 8)"),
        (case(E5M2), "e5m2 weights"),
        (case(BF16), "bf16 weights"),
        (case(uint(4), zero="float"), "float zero points (supported: integer)"),
        (case(uint(4, 8), input_dtype="float32"), "input dtype float32"),
        (case(uint(4, 8), prescale=True), "a per-channel scale of the activations"),
        (case(ElementType("eight", 3, codebook=tuple(range(8)))), "codebook eight of 3 bits"),
        (
            case(
                ElementType("far", 4, codebook=tuple(1e5 * i for i in range(16))),
                input_dtype="float16",
            ),
            "entries that float16 does not hold",
        ),
    ],
    ids=lambda value: str(value),
)
def test_declined(declined: Case, reason: str) -> None:
    reasons = MarlinBackend.can_implement(declined.build().descriptor, A100).reasons
    assert any(reason in given for given in reasons), reasons


def test_needs_a_gpu_of_ampere_or_later() -> None:
    descriptor = COMPUTED[0].build().descriptor
    assert MarlinBackend.can_implement(descriptor, A100)
    assert MarlinBackend.can_implement(descriptor, Platform.parse("cuda:120"))
    old = MarlinBackend.can_implement(descriptor, Platform.parse("cuda:75"))
    assert old.reasons == ("compute capability 75 is too old (needs 80)",)
    here = MarlinBackend.can_implement(descriptor, Platform.detect())
    assert here.reasons == ("device cpu (supported: cuda)",)


@pytest.mark.parametrize(
    ("case", "rounding"),
    [(COMPUTED[0], 0), (case(E4M3), 0), (case(CODEBOOK), 0), (case(ROUNDED), 2**-8)],
    ids=str,
)
def test_only_codebooks_are_rounded(case: Case, rounding: float) -> None:
    stated = MarlinBackend.contract(case.build().descriptor).weight_rounding
    assert stated <= rounding
    assert (stated > 0) == (rounding > 0)


def test_workspace_is_left_as_it_was() -> None:
    problem = case(uint(4, 8), k=1024, group=128).build()
    backend = EmulatedMarlin(problem.descriptor)
    tensors = backend.prep_weights_for_execution(problem.weights)
    x = problem.activations(2)
    first, second = backend.apply(tensors, x), backend.apply(tensors, x)
    assert torch.equal(first, second)
    assert not tensors["workspace"].any()


def _arguments(case: Case) -> tuple[EmulatedMarlin, dict[str, torch.Tensor], torch.Tensor]:
    problem = case.build()
    backend = EmulatedMarlin(problem.descriptor)
    return backend, backend.prep_weights_for_execution(problem.weights), problem.activations(3)


def test_op_is_what_torch_expects() -> None:
    backend, tensors, x = _arguments(case(uint(4), zero="integer"))
    d = backend.descriptor
    torch.library.opcheck(
        torch.ops.compressed_linear.marlin_gemm.default,
        (
            x, tensors["weight"], tensors["scale"], tensors["zero"], None, None, None, None,
            tensors["workspace"], d.n, d.k, d.group_size, "uint4", 0, torch.bfloat16,
        ),
    )  # fmt: skip


def test_shapes_without_numbers() -> None:
    backend, tensors, x = _arguments(COMPUTED[3])
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        out = backend.apply(fakes, mode.from_tensor(x).unsqueeze(0))
    assert out.shape == (1, 3, 256)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("weight", lambda t: t[:-1], ("weight", [7, 256], [8, 256])),
        ("scale", lambda t: t.t(), ("scale", re.compile("contiguous|shape"))),
        ("zero", lambda t: t.float(), ("zero", "float32", "int32")),
        ("workspace", lambda t: t[:8], ("workspace", [8], [1024])),
    ],
)
def test_wrong_arguments(name: str, spoil: object, message: str) -> None:
    backend, tensors, x = _arguments(case(uint(4), zero="integer"))
    assert callable(spoil)
    with pytest.raises(ValueError, match=saying(*message)):
        backend.apply({**tensors, name: spoil(tensors[name])}, x)
