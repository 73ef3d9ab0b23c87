# SPDX-License-Identifier: Apache-2.0
"""The op ``embedding``: rows of a packed weight against the same weight written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import op_calls
from tests.support.cpu_library import tiled
from tests.support.messages import saying
from tests.support.weight_only_ops import DENSE, DTYPES, INTEGERS, SHAPES, Layer, make_layer, pack
from vllm.compressed_linear.machine import native

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


def look_up(layer: Layer, ids: torch.Tensor, **overrides: Any) -> torch.Tensor:
    arguments = {
        "ids": ids,
        "packed": layer.packed,
        "scale": layer.scale,
        "zero": layer.zero,
        "perm": None,
        "table": None,
        "n": layer.n,
        "k": layer.k,
        "group_size": layer.group,
        "element": layer.element,
        "element_bias": layer.element_bias,
        "channels": layer.k,
        "out_dtype": torch.float32,
    }
    return op_calls.embedding(**(arguments | overrides))


def fp32_weight(layer: Layer) -> torch.Tensor:
    """fp32 [N, K], each operation rounded once: code less bias, less zero, times scale."""

    def wide(tiles: torch.Tensor) -> torch.Tensor:
        rows = tiles.transpose(1, 2).flatten(0, 1)[: layer.n]
        return rows.float().repeat_interleave(layer.group, 1)

    values = layer.rows.float() - layer.element_bias
    if layer.zero is not None:
        values = values - wide(layer.zero)
    return values if layer.scale is None else values * wide(layer.scale)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    words = torch.int32 if one.dtype == torch.float32 else torch.int16
    return one.dtype == two.dtype and torch.equal(one.view(words), two.view(words))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [None, "integer", "float"])
@pytest.mark.parametrize("element", INTEGERS)
def test_rows_of_integers(element: str, zero: str | None, out_dtype: torch.dtype) -> None:
    for index, shape in enumerate(SHAPES):
        layer = make_layer(shape, element, zero, DTYPES[index % 3])
        ids = torch.randint(layer.n, (37,))
        expected = fp32_weight(layer)[ids]
        assert same_bits(look_up(layer, ids, out_dtype=out_dtype), expected.to(out_dtype))
        assert torch.allclose(expected.double(), layer.weight[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("element", DENSE)
def test_rows_of_floats_are_the_stored_ones(element: str, out_dtype: torch.dtype) -> None:
    for shape in SHAPES:
        layer = make_layer(shape, element)
        every = torch.arange(layer.n)
        assert same_bits(look_up(layer, every, out_dtype=out_dtype), layer.rows.to(out_dtype))


@pytest.mark.parametrize("element", ["uint1", "uint4", "uint6", "uint7"])
def test_tables_replace_the_integers(element: str) -> None:
    layer = make_layer((40, 96, 32), element)
    table = torch.randn(1 << int(element[4:])).bfloat16()
    assert layer.scale is not None
    scale = layer.scale.transpose(1, 2).flatten(0, 1)[:40].float().repeat_interleave(32, 1)
    ids = torch.tensor([39, 0, 17, 17])
    expected = (table.float()[layer.rows.long()] * scale)[ids]
    assert same_bits(look_up(layer, ids, table=table), expected)


SMALL_FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("element", SMALL_FLOATS)
def test_rows_of_small_floats(element: str) -> None:
    dtype = SMALL_FLOATS[element]
    codes = torch.randn(40, 96).to(dtype)
    scale = torch.rand(40, 3)
    packed = pack(codes.view(torch.uint8), 32, element)
    ids = torch.randint(40, (9,))
    expected = (codes.float() * scale.repeat_interleave(32, 1))[ids]
    layer = make_layer((40, 96, 32), "uint8")
    found = look_up(layer, ids, packed=packed, scale=tiled(scale), element=element, element_bias=0)
    assert same_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu], ids=str)
def test_small_scales_and_scales_of_a_second_level(dtype: torch.dtype) -> None:
    layer = make_layer((40, 96, 32), "uint4")
    table = torch.randn(16)  # values that bfloat16 does not hold
    scale = torch.rand(40, 3).to(dtype)
    row_scale = torch.rand(40)
    tiles = tiled(scale.view(torch.uint8))
    if dtype == torch.float8_e4m3fn:
        tiles = tiles.view(dtype)
    ids = torch.randint(40, (9,))
    wide = scale.float().repeat_interleave(32, 1)
    expected = (table[layer.rows.long()] * wide * row_scale.unsqueeze(1))[ids]
    found = look_up(layer, ids, scale=tiles, table=table, row_scale=row_scale)
    assert same_bits(found, expected)


@pytest.mark.parametrize(
    ("element", "zero"), [("uint4", "integer"), ("uint3", None), ("bf16", None)]
)
def test_channels_come_back_in_their_order(element: str, zero: str | None) -> None:
    """A row of the result times x is what ``linear`` makes of x[:, perm]."""
    layer = make_layer((40, 96, 32 if element != "bf16" else 96), element, zero)
    order = torch.randperm(90).int()
    perm = torch.full((96,), -1).int()
    places = torch.randperm(96)[:90]
    perm[places] = order
    expected = torch.zeros(40, 90)
    expected[:, order.long()] = fp32_weight(layer)[:, places]
    ids = torch.randint(40, (9,))
    assert same_bits(look_up(layer, ids, perm=perm, channels=90), expected[ids])
    twice = perm.clone()
    twice[places[1]] = order[0]
    both = expected[:, order[0].long()] + fp32_weight(layer)[:, places[1]]
    found = look_up(layer, ids, perm=twice, channels=90)
    assert torch.allclose(found[:, order[0].long()], both[ids])


@given(
    n=st.integers(1, 150),
    groups=st.integers(1, 6),
    group=st.integers(1, 70),
    element=st.sampled_from([*INTEGERS, *DENSE]),
    zero=st.sampled_from([None, "integer", "float"]),
    count=st.integers(0, 40),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    n: int, groups: int, group: int, element: str, zero: str | None, count: int, seed: int
) -> None:
    layer = make_layer((n, groups * group, group), element, zero, seed=seed)
    ids = torch.randint(n, (count,), generator=torch.Generator().manual_seed(seed))
    assert same_bits(look_up(layer, ids), fp32_weight(layer)[ids])


def test_many_rows_are_the_same_on_any_number_of_threads() -> None:
    layer = make_layer((500, 200, 40), "uint5", "float")
    ids = torch.randint(500, (4099,))
    full = look_up(layer, ids, out_dtype=torch.bfloat16)
    assert same_bits(full, fp32_weight(layer)[ids].bfloat16())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert same_bits(look_up(layer, ids, out_dtype=torch.bfloat16), full)
    finally:
        torch.set_num_threads(threads)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {
    "id too large": ({"ids": torch.tensor([3, 40])}, ("ids", 40, 1, 0, 39)),
    "id negative": ({"ids": torch.tensor([-1])}, ("ids", -1, 0, 0, 39)),
    "ids dtype": ({"ids": torch.zeros(3).int()}, ("ids", "int32", "int64")),
    "ids shape": ({"ids": torch.zeros(2, 3).long()}, ("ids", [2, 3], "[m]")),
    "ids strided": ({"ids": torch.zeros(6).long()[::2]}, ("ids", "contiguous")),
    "packed": ({"n": 60}, ("packed", [3, 512], [4, 512])),
    "scale": ({"scale": torch.ones(3, 1, 16)}, ("scale", [3, 1, 16], [3, 2, 16])),
    "zero": ({"zero": torch.ones(3, 2, 16).double()}, ("zero", "float64", "bfloat16")),
    "table": ({"table": torch.zeros(8).bfloat16()}, ("table", [8], [16])),
    "bias": ({"element_bias": 17}, ("element_bias", 17, 0, 16)),
    "channels": ({"channels": 60}, ("columns", 60, "perm", 64)),
    "perm": (
        {"perm": torch.arange(64).int(), "channels": 60},
        ("perm", 0, 63, -1, 59),
    ),
    "out dtype": ({"out_dtype": torch.int32}, ("out_dtype", "int32")),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_wrong_arguments_are_named(case: str) -> None:
    overrides, message = BAD_ARGUMENTS[case]
    layer = make_layer((40, 64, 32), "uint4")
    arguments = {"ids": torch.zeros(1).long()} | overrides
    op = "make_problem" if case in ("bias", "channels", "perm") else "embedding"
    with pytest.raises(ValueError, match=saying(f"compressed_linear::{op}", *message)):
        look_up(layer, **arguments)


def test_calls_are_counted_by_element() -> None:
    native.reset_call_counts()
    for element in ("uint4", "uint4", "bf16"):
        look_up(make_layer((40, 64, 64), element), torch.zeros(1).long())
    assert native.call_counts().get("embedding/uint4") == 2
    assert native.call_counts().get("embedding/bf16") == 1


def test_opcheck() -> None:
    layer = make_layer((40, 64, 32), "uint4", "integer")
    arguments = (
        torch.tensor([1, 39, 7]),
        torch.ops.compressed_linear.make_problem(
            "planes", 40, 64, 32, "uint4", 0, "packed scale zero"
        ),
        [layer.packed, layer.scale, layer.zero],
        *(64, torch.bfloat16),
    )
    torch.library.opcheck(torch.ops.compressed_linear.embedding.default, arguments)
