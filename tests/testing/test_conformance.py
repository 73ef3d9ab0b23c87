# SPDX-License-Identifier: Apache-2.0
"""Every registered backend on this machine passes the conformance kit, and the kit is no pushover:
backends that are wrong on purpose fail it, each where it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import typer

from tests.support.cpu_library import ISAS
from tests.support.messages import saying
from vllm.compressed_linear.backends import registry
from vllm.compressed_linear.backends.base import QuantLinearMethod, Verdict
from vllm.compressed_linear.backends.contract import Contract
from vllm.compressed_linear.backends.marlin.backend import MarlinBackend
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import BF16, uint
from vllm.compressed_linear.testing import (
    Case,
    ConformanceError,
    check_backend,
    check_case,
    conformance_cases,
)
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
    before = native.isa()
    torch.ops.compressed_linear.select_isa("floats", isa)
    try:
        check_backend(
            REGISTERED["cpu"], cases=conformance_cases()[1::3], compiled=False
        ).raise_if_failed()
    finally:
        torch.ops.compressed_linear.select_isa("floats", before)


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


class Wrong(ReferenceBackend):
    """A correct backend; each test changes one thing."""

    name = "wrong"


def _wrong(**methods: Any) -> type[QuantLinearMethod]:
    return type("WrongBackend", (Wrong,), methods)


def _prep(
    change: Callable[[dict[str, torch.Tensor]], Any],
) -> Callable[[QuantLinearMethod, CompressedWeights], Any]:
    def prep(self: QuantLinearMethod, weights: CompressedWeights) -> Any:
        tensors = ReferenceBackend.prep_weights_for_execution(self, weights)  # type: ignore[arg-type]
        return change(tensors)

    return prep


def _apply(
    change: Callable[..., Any],
) -> Callable[[QuantLinearMethod, Mapping[str, torch.Tensor], torch.Tensor, Any], Any]:
    """``change(right, tensors, x, bias)`` with ``right`` the correct ``apply``."""

    def apply(
        self: QuantLinearMethod,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> Any:
        def right(tensors: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return ReferenceBackend.apply(self, tensors, x, bias)  # type: ignore[arg-type]

        return change(right, tensors, x, bias)

    return apply


def _embedding(
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[QuantLinearMethod, Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]:
    """``change(rows, ids)`` with ``rows`` what the correct ``embedding`` gives."""

    def embedding(
        self: QuantLinearMethod, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor
    ) -> torch.Tensor:
        return change(ReferenceBackend.embedding(self, tensors, ids), ids)  # type: ignore[arg-type]

    return embedding


CASE = Case(uint(4), 33, 96, zero="integer", bias_dtype="bfloat16", order="act")
"""The case that the wrong backends below are given."""


def _scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors["scale"][-1, -1] *= 1.5
    return tensors


def _crash_when_empty(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
    if x.numel() == 0:
        raise RuntimeError("no rows")
    return right(tensors, x, bias)


def _spoil_x(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
    out = right(tensors, x, bias)
    if 0 not in x.stride():
        x.mul_(0.5)
    return out


def _one_row_for_all(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
    """Quantizes x with one scale for the whole batch, as a dynamic per-tensor scheme would."""
    step = x.abs().max().clamp(min=1e-9) / 127 if x.numel() else 1.0
    return right(tensors, (x / step).round() * step, bias)


def _ignore_strides(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
    memory = torch.as_strided(x, x.shape, torch.empty(x.shape).stride(), x.storage_offset())
    return right(tensors, memory, bias)


class _Keeps(Wrong):
    """Computes with tensors it kept on the class instead of those it returned."""

    kept: ClassVar[dict[str, torch.Tensor]] = {}

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        _Keeps.kept = super().prep_weights_for_execution(weights)
        return dict(_Keeps.kept)

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return super().apply(_Keeps.kept, x, bias)


class _NeedsItsInstance(Wrong):
    """Remembers in ``self`` what preparation found out."""

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        self.tensors = super().prep_weights_for_execution(weights)
        return self.tensors

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return super().apply(self.tensors, x, bias)


class _Stateful(Wrong):
    """Declines every second time."""

    asked: ClassVar[int] = 0

    @classmethod
    def can_implement(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> Verdict:
        cls.asked += 1
        return Verdict(("not today",) if cls.asked % 2 == 0 else ())


def _unwritten(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Allocates a row more than it writes, and the last group's scale is that row's."""
    scale = tensors["scale"]
    tensors["scale"] = torch.empty(scale.shape, dtype=scale.dtype)
    tensors["scale"][:-1] = scale[:-1]
    return tensors


WRONG: dict[str, tuple[type[QuantLinearMethod], str, str]] = {
    "looked up in another order": (
        _wrong(embedding=_embedding(lambda rows, ids: rows.flip(-1))),
        "ids [N]",
        "too far off",
    ),
    "looked up flat": (
        _wrong(embedding=_embedding(lambda rows, ids: rows.flatten(0, -2))),
        "ids [2, 3]",
        "expected torch.bfloat16 of shape [2, 3, 96]",
    ),
    "looked up by the company": (
        _wrong(
            embedding=_embedding(
                lambda rows, ids: rows.masked_fill(rows == 0, -0.0) if len(ids) < 33 else rows
            )
        ),
        "one id often",
        "a row has other bits than beside all others",
    ),
    "looks up what it does not declare": (
        _wrong(
            capabilities=replace(ReferenceBackend.capabilities, lookup=False),
            can_implement=classmethod(lambda cls, descriptor, platform: Verdict()),
        ),
        "can_implement with lookup",
        "accepted what its capabilities do not declare",
    ),
    "scale": (_wrong(prep_weights_for_execution=_prep(_scaled)), "M=1", "too far off"),
    "dtype": (
        _wrong(apply=_apply(lambda right, t, x, b: right(t, x, b).float())),
        "M=0",
        "gave torch.float32 of shape",
    ),
    "shape": (
        _wrong(apply=_apply(lambda right, t, x, b: right(t, x, b).flatten(0, -2))),
        "x [2, 3, K]",
        "expected torch.bfloat16 of shape [2, 3, 33]",
    ),
    "no rows": (_wrong(apply=_apply(_crash_when_empty)), "M=0", "RuntimeError: no rows"),
    "bias": (
        _wrong(apply=_apply(lambda right, t, x, b: right(t, x, None))),
        "x of zeros",
        "too far off",
    ),
    "bias twice": (
        _wrong(apply=_apply(lambda right, t, x, b: right(t, x, b) + (0 if b is None else b))),
        "M=1",
        "too far off",
    ),
    "reordering": (
        _wrong(
            apply=_apply(
                lambda right, t, x, b: right({n: v for n, v in t.items() if n != "order"}, x, b)
            )
        ),
        "M=1",
        "too far off",
    ),
    "strides": (_wrong(apply=_apply(_ignore_strides)), "x transposed", "too far off"),
    "spoils x": (_wrong(apply=_apply(_spoil_x)), "M=1", "changed 'x'"),
    "rounds x": (_wrong(apply=_apply(_one_row_for_all)), "M=17", "too far off"),
    "not a dict": (_wrong(prep_weights_for_execution=_prep(list)), "prepare", "expected a dict"),
    "parameters": (
        _wrong(
            prep_weights_for_execution=_prep(
                lambda t: {n: torch.nn.Parameter(v, requires_grad=False) for n, v in t.items()}
            )
        ),
        "prepare",
        "expected a dict of plain tensors",
    ),
    "dots in names": (
        _wrong(
            prep_weights_for_execution=_prep(lambda t: {f"a.{n}": v for n, v in t.items()}),
            apply=_apply(lambda right, t, x, b: right({n[2:]: v for n, v in t.items()}, x, b)),
        ),
        "prepare",
        "must be Python identifiers",
    ),
    "forgets to write": (
        _wrong(prep_weights_for_execution=_prep(_unwritten)),
        "M=1",
        "too far off",
    ),
    "keeps tensors": (_Keeps, "M=1", "RuntimeError"),
    "keeps state": (_NeedsItsInstance, "M=0", "AttributeError"),
    "changes its mind": (_Stateful, "can_implement", "gave two answers"),
    "no verdict": (
        _wrong(can_implement=classmethod(lambda cls, d, p: True)),
        "can_implement",
        "gave True, expected a Verdict",
    ),
    "fails elsewhere": (
        _wrong(
            can_implement=classmethod(
                lambda cls, d, p: Verdict(() if p.features else (str(1 / 0),))
            )
        ),
        "can_implement on cuda:90",
        "ZeroDivisionError",
    ),
    "size": (
        _wrong(prepared_bytes=classmethod(lambda cls, d: 7)),
        "prepared_bytes",
        "says 7, the tensors have",
    ),
    "seconds": (
        _wrong(seconds=classmethod(lambda cls, d, p, m: float("nan"))),
        "seconds",
        "expected finite numbers",
    ),
    "cannot prepare": (
        _wrong(prep_weights_for_execution=lambda self, weights: 1 / 0),
        "prepare",
        "ZeroDivisionError",
    ),
}


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
    honest = _wrong(apply=_apply(order_follows_rows))
    claims = _wrong(apply=_apply(order_follows_rows), batch_invariant=True)
    assert check_case(honest, case).outcome == "passed"
    failures = check_case(claims, case).failures
    assert {f.check for f in failures} == {"batch invariance"}


def test_spoiled_neighbours_are_caught() -> None:
    def mixes_rows(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
        return right(tensors, x, bias) + 0 * x.sum()

    failures = check_case(_wrong(apply=_apply(mixes_rows)), Case(uint(4, 8)), rows=(2,)).failures
    assert {f.check for f in failures} == {"one row of nan", "one row of inf"}


def test_control_flow_on_the_number_of_rows_is_caught() -> None:
    def looks_at_m(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
        return right(tensors, x, bias) if x.shape[0] > 7 else right(tensors, x + 0, bias)

    failures = check_case(
        _wrong(apply=_apply(looks_at_m)), Case(BF16, group=-1), rows=(2,), compiled=True
    ).failures
    assert {f.check for f in failures} == {"torch.compile, M=64", "torch.compile, M=257"}


def test_declining_is_no_failure_but_silence_is() -> None:
    case = Case(uint(4, 8))
    declines = _wrong(can_implement=classmethod(lambda cls, d, p: Verdict(("needs a GPU",))))
    report = check_backend(declines, cases=[case])
    report.raise_if_failed()
    assert report.results[0].declined == ("needs a GPU",)
    assert report.reasons == {"needs a GPU": 1}
    assert "needs a GPU" in str(report)
    silent = _wrong(can_implement=classmethod(lambda cls, d, p: Verdict(("",))))
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
