# SPDX-License-Identifier: Apache-2.0
"""Code tables against published values and against torch's own types."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.messages import saying
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.elements import ElementType, dense, dtype_name, torch_dtype, uint

# Positive halves, from OCP Microscaling Formats (MX) v1.0, tables 3 to 5.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M3 = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
E3M2 = [m / 16 for m in range(4)] + [(1 + m / 4) * 2.0**e for e in range(-2, 5) for m in range(4)]


@given(st.integers(1, 8), st.integers(0, 255))
def test_integers_are_code_minus_bias(bits: int, bias: int) -> None:
    element = uint(bits, bias)
    codes = torch.arange(1 << bits, dtype=torch.uint8)
    expected = [code - bias for code in range(1 << bits)]
    assert element.decode(codes).tolist() == expected
    assert element.decode(codes.to(torch.int64)).tolist() == expected
    assert element.table().tolist() == expected
    assert element.decode(codes).dtype == torch.float32
    assert element.kind == "integer"


def test_integer_names() -> None:
    assert uint(4, 8).name == str(uint(4, 8)) == "uint4b8"
    assert uint(3).name == "uint3"
    assert uint(4, 8) != uint(4)
    assert len({uint(4, 8), uint(4, 8), uint(4)}) == 2


@pytest.mark.parametrize(
    ("element", "half", "largest"),
    [(elements.E2M1, E2M1, 6), (elements.E2M3, E2M3, 7.5), (elements.E3M2, E3M2, 28)],
    ids=str,
)
def test_small_floats_have_the_published_values(
    element: ElementType, half: list[float], largest: float
) -> None:
    table = element.table()
    assert table.tolist() == [*half, *(-value for value in half)]
    assert max(table.tolist()) == largest
    assert math.copysign(1, table[len(half)].item()) == -1  # minus zero
    assert element.kind == "float"


@pytest.mark.parametrize(
    ("element", "dtype", "largest"),
    [
        (elements.E4M3, torch.float8_e4m3fn, 448),
        (elements.E5M2, torch.float8_e5m2, 57344),
        (elements.E8M0, torch.float8_e8m0fnu, 2.0**127),
    ],
    ids=str,
)
def test_eight_bit_floats_are_torch_s(
    element: ElementType, dtype: torch.dtype, largest: float
) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    table = element.decode(codes)
    torch.testing.assert_close(table, codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    assert table[torch.isfinite(table)].max() == largest


def test_e8m0_are_powers_of_two() -> None:
    table = elements.E8M0.table().double()
    assert table[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert math.isnan(table[255])


def test_codebooks() -> None:
    element = ElementType("three", 2, codebook=(-1.0, 0.25, 3.0, 7.5))
    assert element.kind == "codebook"
    assert element.decode(torch.tensor([[3, 0], [1, 2]])).tolist() == [[7.5, -1.0], [0.25, 3.0]]


@pytest.mark.parametrize("element", [elements.BF16, elements.FP16, elements.FP32], ids=str)
def test_dense_types_hold_the_numbers_themselves(element: ElementType) -> None:
    values = torch.tensor([1.5, -0.25, 100.0], dtype=element.dense_dtype)
    assert element.decode(values).tolist() == values.tolist()
    assert dense(element.dense_dtype) == element
    assert element.kind == "dense"
    with pytest.raises(ValueError, match=saying("table")):
        element.table()


def test_a_table_may_be_changed_by_who_asked_for_it() -> None:
    uint(2).table().zero_()
    assert uint(2).table().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", elements.DTYPE_NAMES)
def test_dtype_names_go_both_ways(name: str) -> None:
    assert dtype_name(torch_dtype(name)) == name


def test_elements_go_to_other_processes() -> None:
    element = ElementType("three", 2, codebook=(-1.0, 0.25, 3.0, 7.5))
    assert pickle.loads(pickle.dumps(element)) == element


def test_what_is_no_element_type_is_refused() -> None:
    with pytest.raises(ValueError, match=saying(12, "bits")):
        ElementType("x", 12)
    with pytest.raises(ValueError, match=saying("codebook", 3, 4)):
        ElementType("x", 2, codebook=(0.0, 1.0, 2.0))
    for bits in (0, 9):
        with pytest.raises(ValueError, match=saying(bits, 1, 8)):
            uint(bits)
    with pytest.raises(ValueError, match="int8"):
        dense(torch.int8)
    with pytest.raises(ValueError, match=saying("codes")):
        _ = uint(4).dense_dtype
    with pytest.raises(ValueError, match=saying("'quad'")):
        torch_dtype("quad")


def test_scales_widen_to_what_they_mean() -> None:
    stored = torch.tensor([0, 1, 127, 130, 254], dtype=torch.uint8)
    expected = [2.0**-127, 2.0**-126, 1.0, 8.0, 2.0**127]
    assert elements.widen_scale(stored).tolist() == expected
    assert elements.widen_scale(torch.tensor([255], dtype=torch.uint8)).isnan().all()
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32):
        assert elements.widen_scale(torch.tensor([0.25]).to(dtype)).tolist() == [0.25]
        assert elements.scale_dtype_name(dtype) == dtype_name(dtype)
    assert elements.scale_dtype_name(torch.uint8) == "e8m0"
    assert torch_dtype("e8m0") == torch.uint8
