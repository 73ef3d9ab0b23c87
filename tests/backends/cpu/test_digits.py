# SPDX-License-Identifier: Apache-2.0
"""Integers and e2m1 times digits of x (csrc/cpu/float/digits.h), on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.support.cpu_library import ISAS
from vllm.compressed_linear.backends.contract import STANDARD, contract_bound
from vllm.compressed_linear.backends.cpu.weight_only import CpuBackend
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.spec.elements import E2M1, ElementType, uint
from vllm.compressed_linear.testing.oracle import Case, Problem
from vllm.compressed_linear.testing.suite import MXFP4, NVFP4

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))

DIGITS = [isa for isa in ISAS if isa in ("avx512vnni", "avxvnni", "avx2madd")]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.ops.compressed_linear.select_isa("floats", request.param)
    yield request.param
    torch.ops.compressed_linear.select_isa("floats", "")


def symmetric(bits: int) -> ElementType:
    return uint(bits, 1 << (bits - 1))


def multiplied(problem: Problem, x: torch.Tensor) -> torch.Tensor:
    backend = CpuBackend(problem.descriptor)
    return backend.apply(backend.prep_weights_for_execution(problem.weights), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_x_of_many_magnitudes_keeps_the_contract(isa: str, bits: int, dtype: str) -> None:
    for group, zero in ((32, None), (96, "integer"), (-1, None)):
        element = uint(bits) if zero else symmetric(bits)
        case = Case(element, 80, 192, group, zero, input_dtype=dtype, data="outliers")
        problem = case.build()
        for rows in (1, 2, 5):
            x = problem.activations(rows)
            expected = problem.expected(x, None)
            error = (multiplied(problem, x).double() - expected).abs()
            assert (error <= problem.bound(x, expected, CpuBackend)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [MXFP4, NVFP4, Case(E2M1, group=-1, zero="float")], ids=str)
def test_e2m1_by_bytes_keeps_the_contract(isa: str, case: Case, dtype: str) -> None:
    # 11 groups of 16 end in the middle of a block.
    k = 192 if case.group != 16 else 176
    problem = replace(case, k=k, input_dtype=dtype, data="outliers").build()
    assert CpuBackend.call_class(problem.descriptor).weights == "int"
    for rows in (1, 2, 5):
        x = problem.activations(rows)
        expected = problem.expected(x, None)
        error = (multiplied(problem, x).double() - expected).abs()
        assert (error <= problem.bound(x, expected, CpuBackend)).all()


@pytest.mark.parametrize("isa", DIGITS, indirect=True)
def test_the_input_term_is_needed_where_the_largest_x_meets_no_weight(isa: str) -> None:
    problem = Case(symmetric(4), 80, 192, data="outliers").build()
    x = problem.activations(3)
    expected = problem.expected(x, None)
    plain = contract_bound(x, problem.magnitude, expected, "bfloat16", STANDARD)
    assert ((multiplied(problem, x).double() - expected).abs() > plain).any()


@pytest.mark.parametrize("isa", DIGITS, indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "case",
    [*(Case(symmetric(bits), scale_dtype="float32") for bits in (3, 4, 8)), MXFP4, NVFP4],
    ids=str,
)
def test_rows_and_threads_change_no_bits(isa: str, case: Case, dtype: str) -> None:
    problem = replace(case, n=200, k=1024, shards=(), input_dtype=dtype).build()
    x = problem.activations(5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = multiplied(problem, x)
        for row in range(5):
            assert torch.equal(multiplied(problem, x[row : row + 1])[0], together[row])
        torch.set_num_threads(3)
        assert torch.equal(multiplied(problem, x), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(len(DIGITS) < 2, reason="one instruction set has digits here")
@pytest.mark.parametrize("data", ["random", "outliers"])
@pytest.mark.parametrize(
    "case", [*(Case(symmetric(bits)) for bits in range(1, 8)), MXFP4, NVFP4], ids=str
)
def test_bits_do_not_depend_on_the_instruction_set(case: Case, data: str) -> None:
    problem = replace(case, data=data, input_dtype="float32").build()
    x = problem.activations(3)
    found = []
    for isa in DIGITS:
        torch.ops.compressed_linear.select_isa("floats", isa)
        found.append(multiplied(problem, x))
    torch.ops.compressed_linear.select_isa("floats", "")
    for y in found[1:]:
        assert torch.equal(y, found[0])


@pytest.mark.parametrize("isa", DIGITS, indirect=True)
def test_whole_numbers_are_exact(isa: str) -> None:
    """Where every product and sum is a whole number below 2²⁴, and scales are 1."""
    problem = Case(symmetric(4), 64, 256, 128, input_dtype="float32").build()
    backend = CpuBackend(problem.descriptor)
    tensors = backend.prep_weights_for_execution(problem.weights)
    tensors["scale"].fill_(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-5000, 5001, (2, 256), generator=generator).float()
    codes = problem.weight / problem.own.scales(0, 64)[0].double().repeat_interleave(128, 1)
    assert torch.equal(backend.apply(tensors, x).double(), x.double() @ codes.round().t())


@pytest.mark.parametrize("isa", DIGITS, indirect=True)
def test_infinities_and_nan_stay_in_their_rows(isa: str) -> None:
    problem = Case(symmetric(8), 64, 128, 32).build()
    x = problem.activations(4)
    clean = multiplied(problem, x)
    x[1, 40], x[2, 3] = float("inf"), float("nan")
    y = multiplied(problem, x)
    assert not torch.isfinite(y[1:3]).any()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
