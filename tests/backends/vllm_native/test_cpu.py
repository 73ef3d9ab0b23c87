# SPDX-License-Identifier: Apache-2.0
"""vLLM's own kernel class for CPUs behind a descriptor: right numbers from any format."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cpu_wna16 import (
    FORMATS,
    HERE,
    assert_within_contract,
    needs_kernel,
    part_of,
    prepared,
    values,
)
from vllm.compressed_linear.backends import vllm_native
from vllm.compressed_linear.backends.contract import contract_bound
from vllm.compressed_linear.backends.vllm_native import VllmNativeBackend
from vllm.compressed_linear.spec.elements import torch_dtype, uint
from vllm.compressed_linear.testing import check_backend

pytestmark = pytest.mark.usefixtures("fresh_answers")


@needs_kernel
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("n", "k", "group", "m"),
    [
        (32, 32, 32, 1),
        (64, 128, 32, 5),
        (96, 96, 2, 3),
        (32, 160, 10, 9),
        (224, 640, 128, 33),
        (64, 1024, 1024, 2),
    ],
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_output_is_within_the_contract(
    fmt: str, zero: bool, dtype: str, n: int, k: int, group: int, m: int, with_bias: bool
) -> None:
    part = part_of(fmt, values(n, k, group, zero=zero, scale_dtype=dtype), dtype)
    backend, tensors = prepared(part)
    x = torch.randn(m, k).to(torch_dtype(dtype))
    bias = torch.randn(n).to(torch_dtype(dtype)) if with_bias else None
    got = backend.apply(tensors, x, bias)
    assert got.dtype == torch_dtype(dtype)
    assert_within_contract(part, got, x, bias)


@needs_kernel
@settings(max_examples=25)
@given(
    n=st.integers(1, 6).map(lambda b: 32 * b),
    half_group=st.sampled_from([1, 2, 4, 8, 16, 32, 48]),
    multiple=st.integers(1, 4),
    m=st.integers(0, 20),
    fmt=st.sampled_from(FORMATS),
    zero=st.booleans(),
    scale_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 1 << 16),
)
def test_any_accepted_shape_is_right(
    n: int,
    half_group: int,
    multiple: int,
    m: int,
    fmt: str,
    zero: bool,
    scale_dtype: str,
    seed: int,
) -> None:
    group = 2 * half_group
    k = 96 * multiple * group // torch.gcd(torch.tensor(96), torch.tensor(group)).item()
    part = part_of(fmt, values(n, int(k), group, zero=zero, scale_dtype=scale_dtype, seed=seed))
    backend, tensors = prepared(part)
    x = torch.randn(m, int(k), generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert_within_contract(part, backend.apply(tensors, x), x)


@needs_kernel
def test_a_single_wrong_code_breaks_the_close_bound() -> None:
    """The tests above can fail: one code off by one among 256 is noticed."""
    right = values(32, 256, 128, zero=True)
    codes = right.codes.clone()
    codes[3, 177] ^= 1
    backend, tensors = prepared(part_of("awq", replace(right, codes=codes)))
    x = torch.randn(4, 256).sign().bfloat16()
    with pytest.raises(AssertionError, match="times the error allowed"):
        assert_within_contract(part_of("awq", right), backend.apply(tensors, x), x)


@needs_kernel
def test_the_standard_contract_would_be_a_lie() -> None:
    """Weights are rounded, so ``weight_rounding`` is not 0, and it is one rounding of the dtype."""
    part = part_of("compressed-tensors", values(64, 256, 32))
    backend, tensors = prepared(part)
    x = torch.randn(8, 256).bfloat16()
    plain = part.weights.dequantize(0, 64)
    expected = x.double() @ plain.double().t()
    error = (backend.apply(tensors, x).double() - expected).abs()
    assert bool((error > contract_bound(x, plain.abs(), expected, "bfloat16")).any())
    assert VllmNativeBackend.contract(part.descriptor).weight_rounding == 2.0**-8
    half = replace(part.descriptor, input_dtype="float16")
    assert VllmNativeBackend.contract(half).weight_rounding == pytest.approx(2.0**-10, rel=1e-3)


@needs_kernel
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
def test_every_format_is_prepared_to_the_same_tensors(zero: bool) -> None:
    first, *others = (prepared(part_of(fmt, values(64, 256, 64, zero=zero)))[1] for fmt in FORMATS)
    names = ["weight_packed", "weight_scale", *(["weight_zero_point"] if zero else [])]
    assert set(first) == {f"cpuwna16_{name}" for name in names}
    for other in others:
        assert first.keys() == other.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name
            assert type(other[name]) is torch.Tensor


@needs_kernel
@pytest.mark.parametrize("bias", [0, 7, 15])
def test_other_biases_become_constant_zero_points(bias: int) -> None:
    """vLLM's class accepts ``uint4`` without zero points; its operator then takes code 8 as 0."""
    part = part_of("compressed-tensors", replace(values(), element=uint(4, bias)))
    backend, tensors = prepared(part)
    assert "cpuwna16_weight_zero_point" in tensors
    x = torch.randn(3, 128).bfloat16()
    assert_within_contract(part, backend.apply(tensors, x), x)


@needs_kernel
def test_zero_points_all_in_the_middle_need_no_zero_points() -> None:
    plain = values(zero=True)
    part = part_of("awq", replace(plain, zero=torch.full_like(plain.scale, 8, dtype=torch.uint8)))
    backend, tensors = prepared(part)
    assert part.descriptor.weight.element == uint(4, 8)
    assert "cpuwna16_weight_zero_point" not in tensors
    x = torch.randn(3, 128).bfloat16()
    assert_within_contract(part, backend.apply(tensors, x), x)


@needs_kernel
@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("uneven", [False, True], ids=["equal groups", "filled groups"])
def test_activation_order_is_a_gather(zero: bool, uneven: bool) -> None:
    plain = values(64, 256, 64, zero=zero)
    index = (torch.arange(256) // 64)[torch.randperm(256)]
    if uneven:
        index[:1] = (index[:1] + 1) % 4
    part = part_of("gptq", replace(plain, index=index))
    order = part.descriptor.channel_order
    assert order is not None
    assert order.padded == uneven
    backend, tensors = prepared(part)
    x = torch.randn(5, 256).bfloat16()
    x[:, 0] = 0
    kept = x.clone()
    assert_within_contract(part, backend.apply(tensors, x), x)
    assert torch.equal(x, kept), "apply changed its input"


@needs_kernel
@pytest.mark.parametrize("ordered", [False, True], ids=["", "act order"])
def test_any_strides_and_ranks(ordered: bool) -> None:
    plain = values(64, 128, 32, zero=True)
    index = (torch.arange(128) // 32).flip(0)
    part = part_of("gptq", replace(plain, index=index if ordered else None))
    backend, tensors = prepared(part)
    base = torch.randn(6, 128).bfloat16()
    want = backend.apply(tensors, base)
    assert_within_contract(part, want, base)
    wide = torch.zeros(6, 300, dtype=torch.bfloat16)
    wide[:, 7:263:2] = base
    for x in (base.t().contiguous().t(), wide[:, 7:263:2]):
        assert not x.is_contiguous()
        assert torch.equal(backend.apply(tensors, x), want)
    wide[:, 100:228] = base
    assert torch.equal(backend.apply(tensors, wide[:, 100:228]), want)
    assert torch.equal(backend.apply(tensors, base.view(2, 3, 128)), want.view(2, 3, 64))
    assert torch.equal(backend.apply(tensors, base[0]), want[0])
    assert torch.equal(backend.apply(tensors, base[:1].expand(4, 128)), want[:1].expand(4, 64))
    assert backend.apply(tensors, base[:0]).shape == (0, 64)
    assert backend.apply(tensors, base.new_empty(2, 0, 128)).shape == (2, 0, 64)


@needs_kernel
def test_pieces_join_to_what_one_repacking_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of("awq", values(224, 128, 32, zero=True))
    whole = prepared(part)[1]
    monkeypatch.setattr(vllm_native.cpu, "PIECE_CODES", 96 * 128)
    pieces = prepared(part)[1]
    for name, tensor in whole.items():
        assert torch.equal(tensor, pieces[name]), name
        assert pieces[name].is_contiguous()


@needs_kernel
def test_conformance() -> None:
    report = check_backend(VllmNativeBackend, HERE)
    report.raise_if_failed()
    assert len(report.of("passed")) >= 30
