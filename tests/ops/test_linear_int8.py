# SPDX-License-Identifier: Apache-2.0
"""Kernels for 8-bit integer activations: the ops against exact integer sums, for every instruction
set of this processor; and their backends in the conformance kit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support import op_calls
from tests.support.cpu_library import ISAS_INT8
from tests.support.int8_ops import ACTIVATIONS, SHAPES, STATIC, TOKEN, arguments, layer
from tests.support.messages import saying
from vllm.compressed_linear.backends.contract import activation_error, contract_bound
from vllm.compressed_linear.backends.cpu.int8 import CpuInt8Backend, CpuInt8FastBackend
from vllm.compressed_linear.backends.registry import NoBackendError, select
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.layer import contract_note
from vllm.compressed_linear.spec.activation import quantize_dequantize
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import INT8, uint
from vllm.compressed_linear.testing import Case, check_case

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


def call(given: dict[str, Any]) -> torch.Tensor:
    return op_calls.linear(layout="quads", **given)


def taken(given: dict[str, Any], spec: ActivationSpec) -> torch.Tensor:
    return quantize_dequantize(given["x"], spec, given["input_scale"], given["input_zero"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_gives_back_what_was_packed(bits: int, shape: tuple[int, int, int]) -> None:
    w = layer(*shape, bits)
    back = torch.ops.compressed_linear.unpack_rows("quads", w.packed, w.n, w.k, w.group, w.element)
    assert torch.equal(back, w.codes)


@pytest.mark.parametrize("spec", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bits", [1, 3, 4, 6, 8])
def test_results_are_those_of_the_quantized_x(
    isa_int8: str, bits: int, spec: ActivationSpec
) -> None:
    """x̂ equals ``spec/activation.py`` bit for bit: one code off would be far outside the bound."""
    for shape in SHAPES:
        if spec.granularity == "group" and shape[2] % 4:
            continue
        w = layer(*shape, bits, zero=bits % 2 == 0)
        x = torch.randn(7, w.k, generator=torch.Generator().manual_seed(w.k)) * 2
        x[1] = 0
        x[2] = x[2].abs() + 3
        given = arguments(w, x, spec)
        used = taken(given, spec)
        expected = used.double() @ w.weight.t()
        bound = contract_bound(used, w.magnitude, expected, "float32")
        error = (call(given).double() - expected).abs()
        assert bool((error <= bound).all()), float((error / bound).max())


@pytest.mark.parametrize("bits", range(1, 9))
def test_sums_of_integers_are_exact(isa_int8: str, bits: int) -> None:
    """With scales that are powers of two nothing is rounded at all, up to the largest codes."""
    w = layer(48, 512, 512, bits)
    w.scale = torch.full_like(w.scale, 0.5)
    w.codes.fill_((1 << bits) - 1)
    torch.ops.compressed_linear.pack_rows("quads", w.packed, w.codes, 0, w.n, w.group, w.element)
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(-128, 128, (5, 512), generator=generator)
    given = arguments(w, q.float() * 0.25, STATIC)
    given["input_scale"] = torch.tensor([0.25])
    exact = q @ (w.codes.long() - (1 << (bits - 1))).t()
    assert torch.equal(call(given), exact.float() * 0.125)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 17, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_instruction_set_batch_and_thread_count_gives_the_same_bits(
    bits: int, rows: int
) -> None:
    w = layer(150, 384, 64, bits, zero=True)
    x = torch.randn(rows, w.k).bfloat16()
    results = []
    threads = torch.get_num_threads()
    try:
        for name in ISAS_INT8:
            torch.ops.compressed_linear.select_isa("integers", name)
            for spec in ACTIVATIONS:
                for count in (1, 2):
                    torch.set_num_threads(count)
                    given = arguments(w, x, spec)
                    results.append((spec, call(given)))
                    given["x"] = x[-1:]
                    assert torch.equal(call(given), results[-1][1][-1:])
    finally:
        torch.ops.compressed_linear.select_isa("integers", "")
        torch.set_num_threads(threads)
    first = dict(reversed(results))
    assert all(torch.equal(out, first[spec]) for spec, out in results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("spec", ACTIVATIONS, ids=str)
def test_what_is_not_a_number_stays_in_its_row(
    isa_int8: str, spec: ActivationSpec, bad: float
) -> None:
    w = layer()
    x = torch.randn(5, w.k)
    clean = call(arguments(w, x, spec))
    x[3, 7] = bad
    given = arguments(w, x, spec)
    out = call(given)
    kept = [0, 1, 2, 4]
    assert torch.equal(out[kept], clean[kept])
    used = taken(given, spec)[3].double() @ w.weight.t()
    assert torch.equal(out[3].isnan(), used.isnan())


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_of_any_finite_size(isa_int8: str, size: float, symmetric: bool) -> None:
    spec = replace(TOKEN, symmetric=symmetric)
    w = layer()
    x = (torch.rand(3, w.k) - 0.5) * (1 if size == 3e38 else 2) * size
    given = arguments(w, x, spec)
    used = taken(given, spec)
    expected = used.double() @ w.weight.t()
    bound = contract_bound(used, w.magnitude, expected, "float32")
    fits = expected.abs() < 3e38
    assert bool((((call(given).double() - expected).abs() <= bound) | ~fits).all())


def test_order_bias_strides_and_dtypes(isa_int8: str) -> None:
    w = layer(40, 128, 32, 4, zero=True)
    generator = torch.Generator().manual_seed(3)
    perm = torch.randperm(160, generator=generator)[:128].to(torch.int32)
    perm[::9] = -1
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(160, 6, generator=generator).to(dtype).t()
        given = arguments(w, x)
        given |= {
            "perm": perm,
            "bias": torch.randn(40, generator=generator).to(dtype),
            "prescale": torch.rand(128, generator=generator) + 0.5,
            "row_scale": torch.rand(40, generator=generator) + 0.5,
            "out_dtype": dtype,
        }
        gathered = x.float()[:, perm.clamp(min=0).long()].masked_fill(perm < 0, 0)
        used = quantize_dequantize(gathered * given["prescale"], TOKEN)
        second = given["row_scale"].double().unsqueeze(1)
        expected = used.double() @ (w.weight * second).t() + given["bias"].double()
        name = str(dtype).removeprefix("torch.")
        bound = contract_bound(used, w.magnitude * second, expected, name)
        # The bias is one more addition in fp32.
        bound += given["bias"].double().abs() * 2.0**-23
        assert bool(((call(given).double() - expected).abs() <= bound).all())


def test_no_rows_and_no_channels() -> None:
    w = layer()
    given = arguments(w, torch.empty(0, w.k))
    assert call(given).shape == (0, w.n)
    empty = layer(0, 64, 64)
    assert call(arguments(empty, torch.ones(2, 64))).shape == (2, 0)


WRONG: list[tuple[dict[str, Any], tuple[object, ...]]] = [
    ({"element": "bf16"}, ("element", "'bf16'", "uint1", "uint8")),
    ({"x": torch.ones(2, 3)}, ("x", [2, 3], "[m, 256]")),
    ({"x": torch.ones(2, 256, dtype=torch.float64)}, ("x", "float64", "bfloat16")),
    ({"x": torch.ones(256)}, ("x", [256])),
    ({"scale": torch.ones(4, 2, 15)}, ("scale", [4, 2, 15], [4, 2, 16])),
    ({"scale": torch.ones(4, 2, 16, dtype=torch.int32)}, ("scale", "int32")),
    ({"packed": torch.zeros(4, 7, dtype=torch.uint8)}, ("packed", [4, 7])),
    ({"group_size": 100}, ("group_size", 100, "divisor", 256)),
    ({"element_bias": 17}, ("element_bias", 17, 0, 16)),
    ({"granularity": "group", "activation_group": 0}, ("activation_group", 0)),
    ({"granularity": "group", "activation_group": 30}, ("groups of 30", "multiple of 4")),
    ({"maximum": 0.0}, ("maximum", 0)),
    ({"maximum": float("inf")}, ("maximum", "inf")),
    ({"input_scale": torch.ones(2)}, ("input_scale", [2], [1])),
    ({"input_zero": torch.zeros(1, dtype=torch.int32)}, ("input_zero", "given")),
    ({"symmetric": False}, ("code_sums", "missing")),
    ({"code_sums": torch.zeros(4, 2, 16, dtype=torch.int32)}, ("code_sums", "given")),
    ({"perm": torch.full((256,), 256, dtype=torch.int32)}, ("perm", 0, 256)),
    ({"row_scale": torch.ones(63)}, ("row_scale", [63], [64])),
    ({"prescale": torch.ones(255)}, ("prescale", [255], [256])),
    ({"bias": torch.ones(63)}, ("bias", [63], [64])),
]


@pytest.mark.parametrize(
    ("change", "message"),
    WRONG,
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: tuple[object, ...]) -> None:
    w = layer()
    op = re.compile("compressed_linear::(make_problem|linear)")
    with pytest.raises(ValueError, match=saying(op, *message)):
        call(arguments(w, torch.ones(2, w.k)) | change)


def test_static_zero_points_must_be_bytes() -> None:
    w = layer()
    given = arguments(w, torch.ones(2, w.k), replace(STATIC, symmetric=False))
    given["input_zero"] = torch.tensor([200], dtype=torch.int32)
    with pytest.raises(ValueError, match=saying("input_zero", 200, -128, 127)):
        call(given)


def test_calls_are_counted_by_path(isa_int8: str) -> None:
    native.reset_call_counts()
    w = layer(bits=4)
    native.reset_call_counts()
    call(arguments(w, torch.ones(2, w.k)))
    assert native.call_counts() == {f"linear/quads/{isa_int8}/uint4": 1}


@pytest.mark.parametrize(
    ("tier", "expected"),
    [
        ("generic", {"generic"}),
        ("avx2", {"avx2", "avxvnni"}),
        ("avx512", {"avx512"}),
        ("avx512bf16", set(ISAS_INT8) - {"amx"}),
        ("amx", {"amx"}),
        ("neon", {"i8mm", "dotprod", "neon"}),
    ],
)
def test_the_variable_keeps_to_its_tier(tier: str, expected: set[str]) -> None:
    if tier not in native.supported_isas():
        pytest.skip(f"this processor has no {tier}")
    text = "from vllm.compressed_linear.machine import native; print(native.isa('integers'))"
    out = subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"VLLM_COMPRESSED_LINEAR_CPU_ISA": tier},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split()[-1] in expected


INT4 = Case(uint(4, 8), activation=TOKEN)
CASES = [
    *(
        Case(uint(bits) if zero else uint(bits, 1 << (bits - 1)), zero=zero, activation=spec)
        for bits in range(1, 9)
        for zero in (None, "integer", "float")
        for spec in ACTIVATIONS[bits % 2 :: 2]
    ),
    *(
        replace(INT4, n=n, k=k, group=group, shards=(), activation=spec)
        for n, k, group in ((1, 1, -1), (17, 8, 4), (65, 130, -1), (130, 257, -1), (96, 512, 0))
        for spec in ACTIVATIONS[:3]
    ),
    *(
        replace(INT4, order=order, element=uint(4), zero="integer", activation=spec)
        for order in ("cut", "act", "ragged")
        for spec in (TOKEN, replace(TOKEN, symmetric=False))
    ),
    *(
        replace(INT4, data=data, activation=spec, element=element, zero=zero)
        for data in ("signed", "largest", "huge", "tiny", "spread", "dead")
        for element, zero in ((uint(8, 128), None), (uint(4), "integer"))
        for spec in (TOKEN, replace(TOKEN, symmetric=False))
    ),
    replace(INT4, prescale=True),
    replace(INT4, prescale=True, order="act", k=160, group=20),
    replace(INT4, row_scale="tensor"),
    replace(INT4, bias_dtype="bfloat16", n=37, shards=(19, 11, 7)),
    replace(INT4, input_dtype="float32", output_dtype="float32", scale_dtype="float32"),
    replace(INT4, input_dtype="float16", output_dtype="float16", scale_dtype="float16"),
]


@pytest.mark.parametrize("case", dict.fromkeys(CASES), ids=str)
def test_the_backend_conforms(case: Case) -> None:
    result = check_case(CpuInt8Backend, case)
    assert not result.declined
    result.raise_if_failed()


@pytest.mark.parametrize("case", dict.fromkeys(replace(c, activation=None) for c in CASES), ids=str)
def test_the_fast_contract_holds_its_own_bound(case: Case) -> None:
    result = check_case(CpuInt8FastBackend, case)
    if not result.declined:
        result.raise_if_failed()
    else:
        assert any("groups of" in reason for reason in result.declined)


def test_the_kit_sees_a_fast_contract_that_is_broken() -> None:
    """Coarser groups than are stated leave the bound."""

    class Coarse(CpuInt8FastBackend):
        name = "coarse"

        @classmethod
        def _activation(cls, descriptor: Any) -> ActivationSpec:
            return replace(TOKEN, maximum=3.0)

    assert check_case(Coarse, Case(uint(4, 8))).failures


def test_the_error_bound_of_rounding_x() -> None:
    spec = ActivationSpec(INT8, True, "group", group_size=32)
    x, w = torch.randn(9, 80), torch.randn(7, 80)
    x[:, 40] = 100
    error = (quantize_dequantize(x, spec) - x).double() @ w.double().t()
    bound = activation_error(x, w.abs(), spec)
    assert bool((error.abs() <= bound).all())
    # Reached by x in the middle between two codes and weights of one sign.
    x = torch.full((1, 32), 0.5)
    x[0, 0] = 127
    worst = (quantize_dequantize(x, spec) - x).double().abs().sum()
    assert float(activation_error(x, torch.ones(1, 32), spec)) == pytest.approx(
        float(worst) * 32 / 31, rel=2e-3
    )
    with pytest.raises(ValueError, match=saying("bound")):
        activation_error(x, w, STATIC)


def test_the_fast_contract_is_only_taken_where_it_is_named() -> None:
    descriptor = Case(uint(4, 8)).build().descriptor
    platform = Platform.detect()
    assert CpuInt8FastBackend.can_implement(descriptor, platform)
    chosen = select(descriptor, platform)
    assert chosen.chosen.name != "cpu_int8_fast"
    assert "cpu_int8_fast" not in {c.name for c in chosen.also_able}
    named = select(descriptor, platform, override="cpu_int8_fast")
    assert named.chosen is CpuInt8FastBackend
    note = contract_note(CpuInt8FastBackend(descriptor))
    assert "int8 dynamic per group of 32" in note
    assert "254" in note
    quantized = INT4.build().descriptor
    assert contract_note(CpuInt8Backend(quantized)) == ""
    with pytest.raises(NoBackendError, match=saying("int8")):
        select(quantized, platform, override="cpu_int8_fast")


def test_quantized_activations_are_chosen_before_reference() -> None:
    descriptor = INT4.build().descriptor
    chosen = select(descriptor, Platform.parse("cpu:avx512bf16"))
    assert (chosen.chosen.name, chosen.variant) == ("cpu_int8", "avx512vnni")
    here = Platform.detect()
    assert select(descriptor, here).variant == CpuInt8Backend.variant(descriptor, here)


def test_codes_below_8_bits_are_faster_where_they_need_not_be_widened() -> None:
    eight, four = (
        replace(case, n=4096, k=4096, shards=(), group=-1).build().descriptor
        for case in (replace(INT4, element=uint(8, 128)), INT4)
    )
    for name, times in (("cpu:avx2", 2.0), ("cpu:avx512", 2.0), ("cpu:avx512bf16", 1.0)):
        platform = Platform.parse(name)
        slow, fast = (CpuInt8Backend.seconds(d, platform, 512) for d in (eight, four))
        assert slow / fast == pytest.approx(times, rel=0.05), name
