# SPDX-License-Identifier: Apache-2.0
"""What holds for quantized activations of every spec."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.activations import STATIC, TOKEN, tokens
from vllm.compressed_linear.spec.activation import quantize_dequantize
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import E2M1, E3M2, E4M3, E5M2
from vllm.compressed_linear.testing.suite import NVFP4_INPUT, mx

SPECS = [
    TOKEN,
    replace(TOKEN, symmetric=False),
    replace(TOKEN, granularity="tensor"),
    replace(TOKEN, granularity="group", group_size=32),
    STATIC,
    replace(STATIC, symmetric=False),
    ActivationSpec(E4M3, True, "token", maximum=448.0),
    ActivationSpec(E5M2, False, "tensor", maximum=57344.0),
    ActivationSpec(E4M3, True, "group", group_size=128, maximum=448.0),
    NVFP4_INPUT,
    mx(E2M1, 4.0),
    mx(E3M2, 16.0),
]


def applied(spec: ActivationSpec, x: torch.Tensor) -> torch.Tensor:
    return quantize_dequantize(x, spec, torch.tensor([0.02]), torch.tensor([-3]))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-30, 1.0, 1e30, 1e38])
def test_finite_numbers_stay_finite_and_zero_stays_zero(spec: ActivationSpec, size: float) -> None:
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * size
    x[:, 3] = 0
    x[:, 70:] = 0
    got = applied(spec, x)
    assert got.dtype == torch.float32
    assert got.shape == x.shape
    assert bool(torch.isfinite(got).all())
    assert not got[x == 0].any()
    assert not bool(((got * x) < 0).any())


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.dynamic], ids=str)
def test_static_quantizing_again_changes_nothing(spec: ActivationSpec) -> None:
    once = applied(spec, tokens())
    assert torch.equal(applied(spec, once), once)


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.dynamic and s.scale_dtype == "float32"], ids=str
)
def test_dynamic_scales_lose_at_most_half_a_step(spec: ActivationSpec) -> None:
    x = tokens()
    x = x[4:5] if spec.mixes_rows else x
    members = x.unflatten(1, (-1, spec.group_size if spec.granularity == "group" else 256))
    reach = members.abs().amax(-1, keepdim=True)
    if not spec.symmetric:
        reach = (
            members.amax(-1, keepdim=True).clamp(min=0)
            - members.amin(-1, keepdim=True).clamp(max=0)
        ) / 2
    error = (quantize_dequantize(x, spec) - x).abs().view(members.shape)
    if spec.element.kind == "integer":
        # An asymmetric zero point is rounded too.
        allowed = reach / 127 * (0.5 if spec.symmetric else 1.0)
    else:
        steps = 2.0 ** -(spec.element.mantissa + 1)
        smallest = 2.0 ** (1 - (1 << (spec.element.exponent - 1)))
        allowed = (members.abs() * steps).clamp(min=reach / spec.maximum * smallest * steps * 2)
    assert bool((error <= allowed * (1 + 1e-5)).all())


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.mixes_rows], ids=str)
def test_tokens_do_not_see_each_other(spec: ActivationSpec) -> None:
    x = tokens(16)
    whole = applied(spec, x)
    for row, width in itertools.product((0, 3, 9), (1, 5)):
        assert torch.equal(applied(spec, x[row : row + width]), whole[row : row + width])
    assert applied(spec, x[:0]).shape == (0, 256)


@given(st.integers(1, 70), st.integers(1, 40))
def test_a_short_last_group_has_a_scale_of_its_own(k: int, group: int) -> None:
    spec = replace(TOKEN, granularity="group", group_size=group)
    x = tokens(9, k)
    parts = [quantize_dequantize(part, TOKEN) for part in x.split(group, 1)]
    assert torch.equal(quantize_dequantize(x, spec), torch.cat(parts, 1))
