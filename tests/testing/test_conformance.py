# SPDX-License-Identifier: Apache-2.0
"""Every registered backend on this machine passes the conformance kit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import typer

from tests.support.cpu_library import ISAS
from tests.support.messages import saying
from vllm.compressed_linear.backends import registry
from vllm.compressed_linear.backends.marlin.backend import MarlinBackend
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.testing import Case, check_backend, check_case, conformance_cases
from vllm.compressed_linear.testing.__main__ import find_backend, of_shape

REGISTERED = {name: found.backend for name, found in registry.backends().items()}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads as the parameter says: many small products are slow with more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("name", REGISTERED)
def test_registered_backend(name: str, threads: int) -> None:
    report = check_backend(REGISTERED[name])
    print(report)
    report.raise_if_failed()
    if name == registry.REFERENCE:
        assert not report.of("declined")


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize("name", REGISTERED)
def test_registered_backend_with_more_threads(name: str, threads: int) -> None:
    check_backend(
        REGISTERED[name], cases=conformance_cases()[::9], compiled=False
    ).raise_if_failed()


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("isa", ISAS[1:])
def test_other_instruction_sets(isa: str, threads: int) -> None:
    """The cpu backend on every path this processor can run, not only on its best."""
    torch.ops.compressed_linear.select_isa("floats", isa)
    try:
        check_backend(
            REGISTERED["cpu"], cases=conformance_cases()[1::3], compiled=False
        ).raise_if_failed()
    finally:
        torch.ops.compressed_linear.select_isa("floats", "")


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("name", REGISTERED)
def test_many_rows(name: str, threads: int) -> None:
    case = Case(uint(4), 64, 96, zero="integer", bias_dtype="bfloat16")
    rows = (4, 5, 7, 8, 15, 31, 32, 33, 65, 127, 128, 129, 255, 511, 1024, 1025, 4096)
    check_case(REGISTERED[name], case, rows=rows).raise_if_failed()


def test_cases_are_many_and_name_themselves() -> None:
    cases = conformance_cases()
    assert len({str(case) for case in cases}) == len(cases) > 150
    kinds = {(c.element.bits, c.zero) for c in cases if c.element.kind == "integer"}
    assert kinds == {(b, z) for b in range(1, 9) for z in (None, "integer", "float")}


def test_a_case_is_the_same_every_time() -> None:
    case = Case(uint(4), zero="integer", order="ragged")
    one, two = case.build(), case.build()
    assert one.descriptor == two.descriptor
    assert one.descriptor.channel_order is not None
    assert one.descriptor.channel_order.padded
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=0)
    torch.testing.assert_close(one.activations(3), two.activations(3), rtol=0, atol=0)


@pytest.mark.parametrize("case", conformance_cases(), ids=str)
def test_exact_weights_agree_with_the_checkpoint(case: Case) -> None:
    """The kit's float64 weights, made without refine, against the loader's own dequantization."""
    problem = case.build()
    stored = problem.weights.dequantize(0, problem.descriptor.n)
    # Subtraction and product of fp32 each round once.
    error = (stored.double() - problem.weight).abs()
    assert bool((error <= 2.0**-23 * problem.magnitude + 1e-45).all())


def test_command_line_finds_backends_by_name_and_by_path() -> None:
    assert find_backend("reference") is ReferenceBackend
    assert find_backend(f"{ReferenceBackend.__module__}:ReferenceBackend") is ReferenceBackend
    for name, message in (
        ("no_such", ("'no_such'", "reference")),
        ("no_such_module:Backend", ("No module named 'no_such_module'",)),
        ("math:pi", ("math:pi", "QuantLinearMethod")),
        ("math:no_such", ("no_such",)),
    ):
        with pytest.raises(typer.BadParameter, match=saying(*message)):
            find_backend(name)


def test_cases_of_one_shape_are_for_kernels_that_decline_odd_ones() -> None:
    cases = of_shape("256x512")
    assert {(case.n, case.k, case.shards) for case in cases} == {(256, 512, (256,))}
    assert {case.element for case in cases} == {case.element for case in conformance_cases()}
    platform = Platform.parse("cuda:80")
    descriptors = [case.build().descriptor for case in cases]
    assert sum(bool(MarlinBackend.can_implement(d, platform)) for d in descriptors) > 90
    for text in ("256", "0x512", "256x", "axb"):
        with pytest.raises(typer.BadParameter, match=saying("NxK")):
            of_shape(text)
