# SPDX-License-Identifier: Apache-2.0
"""The ops of the compiled library, for every instruction set of this processor, against sums in
double precision that are written out here."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.support.cpu_library import ISAS
from tests.support.messages import saying, says
from tests.support.weight_only_ops import DENSE, DTYPES, INTEGERS, SHAPES, make_layer
from vllm.compressed_linear.backends.cpu.weight_only import CpuBackend
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.settings import CPU_ISA
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.testing import Case

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("element", [*INTEGERS, *DENSE])
def test_unpacking_gives_back_the_rows(element: str, shape: tuple[int, int, int]) -> None:
    layer = make_layer(shape, element)
    rows = torch.ops.compressed_linear.unpack_rows(
        "planes", layer.packed, layer.n, layer.k, layer.group, element
    )
    assert torch.equal(rows, layer.rows)


@pytest.mark.parametrize("element", ["uint3", "uint8", "bf16"])
def test_rows_may_be_packed_in_chunks(element: str) -> None:
    layer = make_layer((70, 96, 32), element)
    packed = torch.full_like(layer.packed, 255)
    for start, stop in ((32, 70), (0, 32)):
        torch.ops.compressed_linear.pack_rows(
            "planes", packed, layer.rows[start:stop], start, layer.n, layer.group, element
        )
    assert torch.equal(packed, layer.packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero", [None, "integer", "float"])
@pytest.mark.parametrize("element", INTEGERS)
def test_integer_weights(isa: str, element: str, zero: str | None, dtype: torch.dtype) -> None:
    for index, shape in enumerate(SHAPES):
        layer = make_layer(shape, element, zero, DTYPES[index % 3])
        bias = torch.randn(layer.n).to(dtype)
        for m in (1, 2, 7, 33):
            x = torch.randn(m, layer.k).to(dtype)
            layer.check(x, layer(x, bias), bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("element", DENSE)
def test_dense_weights(isa: str, element: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        layer = make_layer(shape, element)
        for m in (1, 6, 20):
            x = torch.randn(m, layer.k).to(dtype)
            layer.check(x, layer(x))


def test_many_rows(isa: str) -> None:
    """More rows than one unit of work, and more than are prepared at once with wide K."""
    layer = make_layer((100, 256, 64), "uint4", "integer")
    x = torch.randn(4096, 256).bfloat16()
    layer.check(x, layer(x))
    wide = make_layer((16, 32768, 128), "uint4")
    x = torch.randn(300, 32768)
    wide.check(x, wide(x))


@pytest.mark.parametrize(
    ("element", "dtype"),
    [(element, torch.bfloat16) for element in [*INTEGERS, *DENSE]]
    + [(element, dtype) for element in ("uint4", "uint5", "fp16", "bf16") for dtype in DTYPES[1:]],
    ids=str,
)
def test_a_row_has_the_same_bits_in_any_company(isa: str, element: str, dtype: torch.dtype) -> None:
    """K is cut and added in one order, whatever the number of rows and of threads."""
    zero = "integer" if element in INTEGERS[::2] else None
    # The last one is so narrow and deep that its K is cut among threads, too.
    for shape in [(150, 384, 128), (70, 640, 20), (40, 176, 16), (100, 1664, 32)]:
        layer = make_layer(shape, element, zero)
        x = torch.randn(310, layer.k).to(dtype)
        full = layer(x, out_dtype=dtype)
        for m in (1, 2, 3, 4, 5, 6, 8, 9, 12, 13, 64):
            assert torch.equal(layer(x[:m], out_dtype=dtype), full[:m]), m
        assert torch.equal(layer(x[205:206], out_dtype=dtype), full[205:206])
        threads = torch.get_num_threads()
        try:
            for number in (1, 3):
                torch.set_num_threads(number)
                assert torch.equal(layer(x, out_dtype=dtype), full)
                for m in (1, 3, 7):
                    assert torch.equal(layer(x[:m], out_dtype=dtype), full[:m]), (number, m)
        finally:
            torch.set_num_threads(threads)


def test_reordered_channels(isa: str) -> None:
    for element, zero in (("uint4", "integer"), ("uint3", None), ("fp32", None)):
        layer = make_layer((40, 96, 32), element, zero)
        x = torch.randn(5, 90)
        perm = torch.randint(-1, 90, (96,), dtype=torch.int32)
        gathered = x[:, perm.clamp(min=0).long()] * (perm >= 0)
        layer.check(gathered, layer(x, perm=perm))


@pytest.mark.parametrize("element", ["uint4", "uint7"])
def test_tables_replace_the_integers(isa: str, element: str) -> None:
    layer = make_layer((40, 96, 32), element)
    table = torch.randn(1 << int(element[4:])).bfloat16()
    assert layer.scale is not None
    scale = layer.scale.transpose(1, 2).flatten(0, 1)[:40].double().repeat_interleave(32, 1)
    layer.weight = table.double()[layer.rows.long()] * scale
    layer.magnitude = layer.weight.abs()
    for m in (1, 9):
        x = torch.randn(m, 96)
        layer.check(x, layer(x, table=table))


@pytest.mark.parametrize("bits", range(1, 9))
def test_unsigned_codes_without_zero_points(isa: str, bits: int) -> None:
    layer = make_layer((20, 64, 32), f"uint{bits}")
    assert layer.scale is not None
    scale = layer.scale.transpose(1, 2).flatten(0, 1)[:20].double().repeat_interleave(32, 1)
    layer.weight = layer.rows.double() * scale
    layer.magnitude = (layer.rows.double() + (1 << bits)) * scale
    x = torch.randn(3, 64)
    layer.check(x, layer(x, element_bias=0))


def test_any_strides_of_x(isa: str) -> None:
    layer = make_layer((33, 96, 32), "uint4")
    base = torch.randn(7, 192).bfloat16()
    for x in (
        base[:, ::2],
        base[::3, 5:101],
        base.t()[:96].t()[:, :96],
        base[:1, :96].expand(4, 96),
    ):
        assert torch.equal(layer(x), layer(x.contiguous()))
    odd = torch.randn(2 * 96 + 1).bfloat16()[1:].view(2, 96)  # not aligned to 4 bytes
    assert torch.equal(layer(odd), layer(odd.clone()))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_output_is_rounded_once(isa: str, out_dtype: torch.dtype) -> None:
    layer = make_layer((40, 128, 64), "uint4")
    x = torch.randn(9, 128)
    assert torch.equal(layer(x, out_dtype=out_dtype), layer(x).to(out_dtype))


def test_infinities_and_nan_stay_in_their_rows(isa: str) -> None:
    layer = make_layer((40, 128, 64), "uint4", "integer")
    for dtype in DTYPES:
        x = torch.randn(9, 128).to(dtype)
        clean = layer(x)
        x[3, 5], x[6, 77] = float("inf"), float("nan")
        y = layer(x)
        rows = torch.tensor([r not in (3, 6) for r in range(9)])
        assert torch.equal(y[rows], clean[rows])
        assert not torch.isfinite(y[3]).any()
        assert torch.isnan(y[6]).all()


def test_no_rows_and_no_columns(isa: str) -> None:
    layer = make_layer((40, 128, 64), "uint4")
    assert layer(torch.empty(0, 128)).shape == (0, 40)
    empty = make_layer((0, 128, 64), "uint4")
    assert empty(torch.empty(3, 128)).shape == (3, 0)


def test_instruction_sets_agree_within_the_contract() -> None:
    layer = make_layer((64, 256, 32), "uint6", "float")
    x = torch.randn(5, 256)
    try:
        for name in ISAS:
            torch.ops.compressed_linear.select_isa("floats", name)
            layer.check(x, layer(x))
    finally:
        torch.ops.compressed_linear.select_isa("floats", "")


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {
    "element": ({"element": "int4"}, ("element", "'int4'", "uint1", "uint8")),
    "group": ({"group_size": 30}, ("group_size", 30, "divisor", 64)),
    "packed shape": ({"n": 60}, ("packed", [3, 512], [4, 512])),
    "packed dtype": ({"packed": torch.zeros(3, 512)}, ("packed", "float32", "uint8")),
    "scale shape": (
        {"scale": torch.ones(3, 1, 16)},
        ("scale", [3, 1, 16], [3, 2, 16]),
    ),
    "scale dtype": (
        {"scale": torch.ones(3, 2, 16).double()},
        ("scale", "float64", "bfloat16"),
    ),
    "zero shape": ({"zero": torch.ones(2, 2, 16)}, ("zero", [2, 2, 16])),
    "bias shape": ({"bias": torch.ones(41)}, ("bias", [41], [40])),
    "x columns": ({"x": torch.ones(2, 63)}, ("x", [2, 63], "[m, 64]")),
    "x rank": ({"x": torch.ones(64)}, ("x", [64], "[m, 64]")),
    "x dtype": (
        {"x": torch.ones(2, 64).int()},
        ("x", "int32", "bfloat16", "float16", "float32"),
    ),
    "perm range": (
        {"perm": torch.full((64,), 64).int()},
        ("perm", 0, 64, -1, 63),
    ),
    "perm low": (
        {"perm": torch.full((64,), -2).int()},
        ("perm", -2, -1, -1, 63),
    ),
    "perm dtype": ({"perm": torch.zeros(64).long()}, ("perm", "int64", "int32")),
    "table": ({"table": torch.zeros(8).bfloat16()}, ("table", [8], [16])),
    "strided": ({"scale": torch.ones(3, 16, 2).transpose(1, 2)}, ("scale", "contiguous")),
    "bias value": ({"element_bias": 17}, ("element_bias", 17, 0, 16)),
    "out dtype": ({"out_dtype": torch.int32}, ("out_dtype", "int32")),
}


PARSED = {"element", "group", "perm range", "perm low", "perm dtype", "bias value"}
"""Cases that are found when a layer is prepared."""


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_wrong_arguments_are_named(case: str) -> None:
    overrides, message = BAD_ARGUMENTS[case]
    layer = make_layer((40, 64, 32), "uint4")
    op = "make_problem" if case in PARSED else "linear"
    with pytest.raises(ValueError, match=saying(f"compressed_linear::{op}", *message)):
        layer(overrides.pop("x", torch.ones(2, 64)), **overrides)


def test_a_stale_problem_or_order_is_refused_or_reads_nothing_outside() -> None:
    ops = torch.ops.compressed_linear
    layer = make_layer((40, 64, 32), "uint4")
    order = torch.randperm(64).int()
    problem = ops.make_problem(
        "planes", 40, 64, 32, "uint4", layer.element_bias, "packed scale perm", order
    )
    x = torch.randn(2, 64)

    def call(problem: torch.Tensor, *perm: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, problem, [layer.packed, layer.scale, *perm], None, 40, torch.float32)

    layer.check(x[:, order.long()], call(problem, order))
    for at, number in ((0, 0), (4, 48), (5, 1 << 40), (len(problem) - 1, 0)):
        stale = problem.clone()
        stale[at] = number
        with pytest.raises(ValueError, match=saying("linear", "problem", "make_problem")):
            call(stale, order)
    for wrong in (problem[:-1], problem.int(), torch.zeros(0).long()):
        with pytest.raises(ValueError, match=saying("linear", "problem", "expected")):
            call(wrong, order)
    with pytest.raises(ValueError, match=saying("linear", "2 tensors", "expected", 3)):
        call(problem)
    far = order.clone()
    far[::2] = 1 << 30
    kept = x[:, order.long()]
    kept[:, ::2] = 0
    layer.check(kept, call(problem, far))


def test_wrong_rows_are_named() -> None:
    ops = torch.ops.compressed_linear
    layer = make_layer((40, 64, 32), "uint4")
    rows = layer.rows
    with pytest.raises(ValueError, match=saying("row_start", 8, "multiple", 16)):
        ops.pack_rows("planes", layer.packed, rows[8:], 8, 40, 32, "uint4")
    with pytest.raises(ValueError, match=saying("rows", 20, 16, 40)):
        ops.pack_rows("planes", layer.packed, rows[:20], 0, 40, 32, "uint4")
    with pytest.raises(ValueError, match=saying("rows", 4)):
        ops.pack_rows("planes", layer.packed, rows + 16, 0, 40, 32, "uint4")
    with pytest.raises(ValueError, match=saying("rows", "int32", "uint8")):
        ops.pack_rows("planes", layer.packed, rows.int(), 0, 40, 32, "uint4")


def test_calls_are_counted_by_path(isa: str) -> None:
    layer = make_layer((40, 64, 32), "uint4")
    native.reset_call_counts()
    for _ in range(3):
        layer(torch.ones(1, 64))
    assert native.call_counts() == {f"linear/planes/{isa}/uint4": 3}
    native.reset_call_counts()
    assert native.call_counts() == {}


def test_opcheck() -> None:
    layer = make_layer((40, 64, 32), "uint4", "integer")
    ops = torch.ops.compressed_linear
    perm = torch.randperm(64).int()
    arguments = (
        torch.randn(3, 64).bfloat16(),
        ops.make_problem("planes", 40, 64, 32, "uint4", 0, "packed scale zero perm", perm),
        [layer.packed, layer.scale, layer.zero, perm],
        torch.randn(40),
        40,
        torch.bfloat16,
    )
    torch.library.opcheck(ops.linear.default, arguments)
    torch.library.opcheck(ops.unpack_rows.default, ("planes", layer.packed, 40, 64, 32, "uint4"))
    torch.library.opcheck(
        ops.pack_rows.default, ("planes", layer.packed.clone(), layer.rows, 0, 40, 32, "uint4")
    )


def test_loading_twice_is_harmless() -> None:
    native.load()
    native.load()
    assert native.available() is None
    assert native.layout_id().startswith("tile16-block32")


def ask_isa(wanted: str) -> subprocess.CompletedProcess[str]:
    code = "from vllm.compressed_linear.machine import native; print(native.isa())"
    environment = os.environ | {"VLLM_COMPRESSED_LINEAR_CPU_ISA": wanted}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_the_environment_selects_the_instruction_set() -> None:
    assert ask_isa("generic").stdout.split()[-1] == "generic"


@pytest.mark.parametrize("tier", ["generic", "avx2", "avx512", "avx512bf16"])
def test_plans_name_the_instruction_set_that_runs(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CPU_ISA, raising=False)
    descriptor = Case(uint(4)).build().descriptor
    assert CpuBackend.variant(descriptor, Platform.parse(f"cpu:{tier}")).endswith(tier)
    for isa in ISAS:
        torch.ops.compressed_linear.select_isa("floats", isa)
        try:
            assert CpuBackend.variant(descriptor, Platform.detect()) == isa
        finally:
            torch.ops.compressed_linear.select_isa("floats", "")


def test_an_unknown_instruction_set_is_an_error_that_names_the_known() -> None:
    result = ask_isa("avx9")
    assert result.returncode != 0
    assert says(result.stderr, "VLLM_COMPRESSED_LINEAR_CPU_ISA", "'avx9'")
    assert "generic" in result.stderr.splitlines()[-1]
