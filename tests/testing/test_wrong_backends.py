# SPDX-License-Identifier: Apache-2.0
"""The conformance kit is strict: backends that are wrong on purpose fail it, each where it is
wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.messages import saying
from tests.support.wrong_backends import CASE, WRONG, Wrong, changed_apply, wrong_backend
from vllm.compressed_linear.backends.base import QuantLinearMethod, Verdict
from vllm.compressed_linear.backends.contract import Contract
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import BF16, uint
from vllm.compressed_linear.testing import Case, ConformanceError, check_backend, check_case


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_backend_is_caught(wrong: str) -> None:
    backend, check, message = WRONG[wrong]
    result = check_case(backend, CASE, rows=(0, 1, 17))
    assert result.outcome == "failed"
    assert any(f.check == check and message in f.message for f in result.failures), result.failures
    with pytest.raises(ConformanceError, match="uint4"):
        result.raise_if_failed()


def test_the_backend_they_derive_from_passes() -> None:
    result = check_case(Wrong, CASE, rows=(0, 1, 17), compiled=True)
    assert result.outcome == "passed"
    assert 0 < result.worst <= 1


def test_rounding_weights_to_bf16_is_outside_the_contract() -> None:
    """A dequantized weight rounded to bf16 looks right to any loose tolerance."""

    class Rounds(ReferenceBackend):
        name = "rounds"
        capabilities = replace(ReferenceBackend.capabilities, lookup=False)
        prepared_bytes = QuantLinearMethod.prepared_bytes

        def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
            return {"weight": weights.dequantize(0, weights.n).bfloat16()}

        def apply(
            self,
            tensors: Mapping[str, torch.Tensor],
            x: torch.Tensor,
            bias: torch.Tensor | None = None,
        ) -> torch.Tensor:
            return torch.nn.functional.linear(x.float(), tensors["weight"].float()).to(x.dtype)

    class SaysSo(Rounds):
        @classmethod
        def contract(cls, descriptor: CompressedLinearDescriptor) -> Contract:
            return Contract(weight_rounding=2.0**-8)

    case = Case(uint(7, 64), 64, 256, input_dtype="float32")
    assert check_case(Rounds, case).outcome == "failed"
    assert check_case(SaysSo, case).outcome == "passed"


def test_claimed_batch_invariance_is_checked() -> None:
    def order_follows_rows(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
        """Adds the channels up in an order that depends on M, within the contract."""
        turn = x.reshape(-1, x.shape[-1]).shape[0] % 7
        tensors = {**tensors, "codes": tensors["codes"].roll(turn, 1)}
        return right(tensors, x.roll(turn, -1), bias)

    case = Case(uint(8, 128), 8, 256, group=-1, input_dtype="float32")
    honest = wrong_backend(apply=changed_apply(order_follows_rows))
    claims = wrong_backend(apply=changed_apply(order_follows_rows), batch_invariant=True)
    assert check_case(honest, case).outcome == "passed"
    failures = check_case(claims, case).failures
    assert {f.check for f in failures} == {"batch invariance"}


def test_spoiled_neighbours_are_caught() -> None:
    def mixes_rows(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
        return right(tensors, x, bias) + 0 * x.sum()

    failures = check_case(
        wrong_backend(apply=changed_apply(mixes_rows)), Case(uint(4, 8)), rows=(2,)
    ).failures
    assert {f.check for f in failures} == {"one row of nan", "one row of inf"}


def test_control_flow_on_the_number_of_rows_is_caught() -> None:
    def looks_at_m(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
        return right(tensors, x, bias) if x.shape[0] > 7 else right(tensors, x + 0, bias)

    failures = check_case(
        wrong_backend(apply=changed_apply(looks_at_m)),
        Case(BF16, group=-1),
        rows=(2,),
        compiled=True,
    ).failures
    assert {f.check for f in failures} == {"torch.compile, M=64", "torch.compile, M=257"}


def test_declining_is_no_failure_but_silence_is() -> None:
    case = Case(uint(4, 8))
    declines = wrong_backend(can_implement=classmethod(lambda cls, d, p: Verdict(("needs a GPU",))))
    report = check_backend(declines, cases=[case])
    report.raise_if_failed()
    assert report.results[0].declined == ("needs a GPU",)
    assert report.reasons == {"needs a GPU": 1}
    assert "needs a GPU" in str(report)
    silent = wrong_backend(can_implement=classmethod(lambda cls, d, p: Verdict(("",))))
    with pytest.raises(ConformanceError, match="without saying why"):
        check_backend(silent, cases=[case]).raise_if_failed()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_platform_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=saying("cuda:90")):
        check_case(ReferenceBackend, CASE, Platform.parse("cuda:90"))


def test_report_shows_where_a_backend_is_wrong() -> None:
    backend = WRONG["bias"][0]
    report = check_backend(backend, cases=[CASE, Case(BF16)], rows=(1,), compiled=False)
    assert [r.outcome for r in report.results] == ["failed", "passed"]
    text = str(report)
    assert str(CASE) in text
    assert "x of zeros" in text
    with pytest.raises(ConformanceError, match=saying("wrong", 1, 2)):
        report.raise_if_failed()
