# SPDX-License-Identifier: Apache-2.0
"""The kit sees a backend that leaves out, or gets wrong, one step of the descriptor's equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.messages import saying
from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.prepare.self_check import SelfCheckError, self_check
from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import E3M2, E4M3, E5M2, INT8, uint, widen_scale
from vllm.compressed_linear.testing import Case, check_case, conformance_cases
from vllm.compressed_linear.testing.suite import (
    FP8,
    FP8_BLOCK,
    INT8_TOKEN,
    MXFP4,
    NVFP4,
    NVFP4_INPUT,
    mx,
)

Tensors = dict[str, torch.Tensor]


class Wrong(ReferenceBackend):
    """Correct; each test below changes the prepared tensors or the descriptor it computes."""

    name = "wrong"
    prepared_bytes = QuantLinearMethod.prepared_bytes


def prepares(change: Callable[[Tensors], Any]) -> type[QuantLinearMethod]:
    """A backend that applies ``change`` to what is prepared."""

    class Changed(Wrong):
        def prep_weights_for_execution(self, weights: CompressedWeights) -> Tensors:
            tensors = super().prep_weights_for_execution(weights)
            change(tensors)
            return tensors

    return Changed


def computes(**changes: Any) -> type[QuantLinearMethod]:
    """A backend that computes another activation or transform. A callable gets the right one."""

    class Changed(Wrong):
        def apply(
            self,
            tensors: Mapping[str, torch.Tensor],
            x: torch.Tensor,
            bias: torch.Tensor | None = None,
        ) -> torch.Tensor:
            d = self.descriptor
            new = {n: c(getattr(d, n)) if callable(c) else c for n, c in changes.items()}
            return ReferenceBackend(replace(d, **new)).apply(tensors, x, bias)

    return Changed


def activation(**changes: Any) -> type[QuantLinearMethod]:
    return computes(activation=lambda right: replace(right, **changes))


def without(name: str) -> type[QuantLinearMethod]:
    return prepares(lambda tensors: tensors.pop(name))


def _scale_as(tensors: Tensors, dtype: torch.dtype) -> None:
    tensors["scale"] = tensors["scale"].view(dtype)


def _linear_exponents(tensors: Tensors) -> None:
    tensors["scale"] = tensors["scale"].float() / 127


def _flushed(tensors: Tensors) -> None:
    """Denormal e4m3 scales as zeros."""
    scale = tensors["scale"].float()
    tensors["scale"] = torch.where(scale < 2.0**-6, 0, scale)


def _first_of_all(tensors: Tensors) -> None:
    tensors["row_scale"] = tensors["row_scale"][:1].expand(len(tensors["codes"])).clone()


def _next_block(tensors: Tensors) -> None:
    tensors["scale"] = tensors["scale"].roll(1, 0)


class TruncatesInsteadOfRounding(Wrong):
    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        scale = torch.where(scale == 0, 1, scale)
        taken = (x.float() / scale).trunc() * scale
        plain = replace(self.descriptor, activation=None)
        return ReferenceBackend(plain).apply(tensors, taken, bias)


class RoundsTiesAway(Wrong):
    """As C's ``round`` does."""

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scale = tensors["input_scale"]
        codes = (x.float() / scale).abs().add(0.5).floor() * x.sign()
        taken = codes.clamp(-128, 127) * scale
        plain = replace(self.descriptor, activation=None)
        return ReferenceBackend(plain).apply(tensors, taken, bias)


INT8_CASE = Case(uint(8, 128), group=-1, scale_dtype="float32", output_dtype="float32")
TOKEN = replace(INT8_CASE, activation=INT8_TOKEN)
ASYMMETRIC = replace(INT8_CASE, activation=replace(INT8_TOKEN, symmetric=False))
STATIC = replace(INT8_CASE, activation=replace(INT8_TOKEN, dynamic=False, granularity="tensor"))
STATIC_ZERO = replace(STATIC, activation=ActivationSpec(INT8, False, "tensor", symmetric=False))
GROUPED = replace(INT8_CASE, activation=replace(INT8_TOKEN, granularity="group", group_size=32))
NVFP4_FULL = replace(NVFP4, output_dtype="float32", activation=NVFP4_INPUT)
MXFP4_FULL = replace(MXFP4, output_dtype="float32", activation=mx(E3M2, 16.0))
FP8_TOKEN = replace(FP8, activation=ActivationSpec(E4M3, True, "token", maximum=448.0))
TWO_SHARDS = replace(NVFP4, n=48, shards=(32, 16))
HADAMARD = replace(INT8_CASE, hadamard=32)

WRONG: dict[str, tuple[type[QuantLinearMethod], Case]] = {
    "row scale left out": (without("row_scale"), NVFP4),
    "row scale of the first shard for all": (prepares(_first_of_all), TWO_SHARDS),
    "row scale squared": (prepares(lambda t: t["row_scale"].square_()), NVFP4),
    "exponents as numbers": (prepares(_linear_exponents), MXFP4),
    "exponents off by one": (prepares(lambda t: t["scale"].add_(1)), MXFP4),
    "e4m3 scales as e5m2": (prepares(lambda t: _scale_as(t, torch.float8_e5m2)), NVFP4),
    "e4m3 denormals as zeros": (prepares(_flushed), replace(NVFP4, data="tiny")),
    "blocks of the next rows": (prepares(_next_block), FP8_BLOCK),
    "x not quantized": (computes(activation=None), TOKEN),
    "x not quantized, static": (computes(activation=None), STATIC),
    "x not quantized, nvfp4": (computes(activation=None), NVFP4_FULL),
    "x not quantized, mx": (computes(activation=None), MXFP4_FULL),
    "x not quantized, fp8": (computes(activation=None), FP8_TOKEN),
    "another maximum": (activation(maximum=127.5), TOKEN),
    "another maximum, mx": (activation(maximum=15.0), MXFP4_FULL),
    "another type": (activation(element=E5M2), FP8_TOKEN),
    "scale of the batch": (activation(granularity="tensor"), TOKEN),
    "scale of the token": (activation(granularity="token", group_size=-1), GROUPED),
    "scale of half a group": (activation(group_size=16), GROUPED),
    "scale from x": (activation(dynamic=True), STATIC),
    "zero point left out": (activation(symmetric=True), ASYMMETRIC),
    "static zero point left out": (activation(symmetric=True), STATIC_ZERO),
    "zero point one off": (prepares(lambda t: t["input_zero"].add_(1)), STATIC_ZERO),
    "static scale left out": (prepares(lambda t: t["input_scale"].fill_(1)), NVFP4_FULL),
    "fp32 scales of groups": (activation(scale_dtype="float32"), NVFP4_FULL),
    "any scales of groups": (activation(scale_dtype="float32"), MXFP4_FULL),
    "truncates": (TruncatesInsteadOfRounding, TOKEN),
    "rounds ties away": (RoundsTiesAway, STATIC),
    "prescale left out": (without("prescale"), replace(INT8_CASE, prescale=True)),
    "prescale in another order": (
        prepares(lambda t: t["prescale"].copy_(t["prescale"].flip(0))),
        replace(INT8_CASE, group=32, order="act", prescale=True),
    ),
    "transform left out": (computes(transform=None), HADAMARD),
    "transform of larger blocks": (
        computes(transform=lambda right: replace(right, block=64)),
        HADAMARD,
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_backend_is_caught(wrong: str) -> None:
    backend, case = WRONG[wrong]
    right = check_case(Wrong, case, rows=(1, 17))
    assert right.outcome == "passed", right.failures
    result = check_case(backend, case, rows=(1, 17))
    assert result.outcome == "failed"
    assert any("too far off" in f.message for f in result.failures), result.failures


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_at_load_sees_it_too(wrong: str) -> None:
    """But for what its two tokens of random numbers cannot show."""
    backend, case = WRONG[wrong]
    problem = case.build()
    for kind in (Wrong, backend):
        method = kind(problem.descriptor)
        tensors = method.prep_weights_for_execution(problem.own)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        if kind is Wrong:
            self_check("layer", method, tensors, problem.weights)
        elif wrong not in ("scale of the batch", "rounds ties away"):
            with pytest.raises(SelfCheckError, match=saying("layer", "backend wrong")):
                self_check("layer", method, tensors, problem.weights)


def test_scales_over_the_batch_are_computed_over_the_batch() -> None:
    """There rows do see each other, so what isolates them elsewhere is not asked for."""
    case = replace(TOKEN, activation=replace(INT8_TOKEN, granularity="tensor"))
    assert check_case(Wrong, case, rows=(0, 1, 17)).outcome == "passed"
    assert check_case(activation(granularity="token"), case, rows=(17,)).outcome == "failed"


def test_every_kind_of_scale_and_activation_has_a_case() -> None:
    cases = conformance_cases()
    floats = {(c.element.name, c.scale_dtype) for c in cases if c.element.kind == "float"}
    for name in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1"):
        assert (name, "e8m0") in floats
    assert ("e2m1", "float8_e4m3fn") in floats
    assert {c.element.name for c in cases if c.block_rows == 128} == {"e4m3", "e5m2"}
    kinds = {c.activation.kind for c in cases if c.activation}
    assert kinds >= {
        *(f"int8 {when} per {what}" for when, what in WHEN_AND_WHAT),
        *(f"int8 {when} per {what}, asymmetric" for when, what in WHEN_AND_WHAT[:3]),
        *(f"e4m3 {when} per {what}" for when, what in WHEN_AND_WHAT[:3]),
        *(f"{e} dynamic per group with e8m0 scales" for e in ("e2m1", "e2m3", "e3m2", "e4m3")),
        "e2m1 dynamic per group with e4m3 scales",
    }


WHEN_AND_WHAT = [
    ("dynamic", "token"),
    ("static", "tensor"),
    ("dynamic", "group"),
    ("dynamic", "tensor"),
]


@pytest.mark.parametrize("data", ["huge", "tiny", "spread", "largest"])
@pytest.mark.parametrize("base", [NVFP4, MXFP4, FP8_BLOCK], ids=str)
def test_adversarial_scales_are_what_they_are_called(base: Case, data: str) -> None:
    problem = replace(base, data=data).build()
    rows = problem.weights.rows(0, problem.descriptor.n)
    assert rows.scale is not None
    scale = widen_scale(rows.scale)
    assert bool(torch.isfinite(problem.weight).all())
    if data == "spread":
        assert scale.max() / scale.min() > 2**8
    if data == "huge" and base is NVFP4:
        assert scale.max() > 256
    if data == "tiny" and base is NVFP4:
        assert scale.min() < 2.0**-6
        assert bool((scale == 0).any() | (scale == 2.0**-9).any())
    if data == "largest":
        element = problem.descriptor.weight.element
        assert element.decode(rows.codes).unique().tolist() == [element.largest]


def test_a_descriptor_says_what_its_case_does() -> None:
    problem = MXFP4_FULL.build()
    d = CompressedLinearDescriptor.from_json(problem.descriptor.to_json())
    assert d.activation == MXFP4_FULL.activation
    assert "e8m0 scale" in str(d)
    assert "x as e3m2 dynamic per group of 32 with e8m0 scales, maximum 16" in str(d)
