# SPDX-License-Identifier: Apache-2.0
"""Quantized activations against torch's casts, compressed-tensors, vLLM's reference code and
the definition worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from tests.support.activations import STATIC, TOKEN, tokens
from tests.support.messages import saying
from vllm.compressed_linear.spec.activation import (
    hadamard,
    prepare_input,
    quantize_dequantize,
    round_to,
)
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import E2M1, E2M3, E3M2, E4M3, E5M2, ElementType, uint
from vllm.compressed_linear.testing.suite import NVFP4_INPUT, mx

FLOATS = (E4M3, E5M2, E3M2, E2M3, E2M1)
FP8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


@pytest.mark.parametrize("element", FLOATS, ids=str)
def test_small_floats_round_to_the_nearest_value_and_ties_to_even(element: ElementType) -> None:
    """Between any two neighbours: at them, in the middle, and beside the middle."""
    table = element.table()
    finite = table[torch.isfinite(table)].unique()
    low, high = finite[:-1], finite[1:]
    middle = (low + high) / 2
    inf = torch.full_like(middle, math.inf)
    below, above = torch.nextafter(middle, -inf), torch.nextafter(middle, inf)
    assert torch.equal(round_to(finite, element), finite)
    assert torch.equal(round_to(below, element), low)
    assert torch.equal(round_to(above, element), high)
    # Codes of equal sign count up with the value, and the even one ends in 0.
    codes = {float(v): code for code, v in enumerate(table.tolist()) if math.isfinite(v)}
    codes[0.0] = 0
    even = [a if codes[a] % 2 == 0 else b for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    assert round_to(middle, element).tolist() == even
    beyond = torch.tensor([element.largest * 1.2, 1e30, math.inf])
    assert round_to(torch.cat([beyond, -beyond]), element).tolist() == (
        [element.largest] * 3 + [-element.largest] * 3
    )
    assert round_to(torch.tensor([math.nan]), element).isnan().all()


@pytest.mark.parametrize("element", FP8, ids=str)
def test_fp8_rounds_as_torch_casts(element: ElementType) -> None:
    exponents = torch.arange(-160, 18).float().unsqueeze(1)
    x = torch.exp2(exponents) * (1 + torch.arange(512) / 512)
    x = torch.cat([x, -x]).clamp(-element.largest, element.largest)
    assert torch.equal(round_to(x, element), x.to(FP8[element]).float())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_round_to_even_and_saturate(bits: int) -> None:
    half = 1 << (bits - 1)
    x = torch.tensor([0.5, 1.5, -0.5, -1.5, half - 0.5, half + 9, -half - 0.5, -1e9])
    expected = [0, min(2, half - 1), 0, -2, half - 1, half - 1, -half, -half]
    assert round_to(x, uint(bits, half)).tolist() == expected


def compressed_tensors(x: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """x̂ as compressed-tensors' own dynamic quantization has it."""
    args = QuantizationArgs(dynamic=True, **arguments)
    # Tokens are the second of three dimensions there.
    x = x.unsqueeze(0) if args.strategy == "token" else x
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    return fake_quantize(x, scale, zero, args).reshape(x.shape[-2:])


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        (replace(TOKEN, maximum=127.5), {"strategy": "token"}),
        (replace(TOKEN, symmetric=False), {"strategy": "token", "symmetric": False}),
        (replace(TOKEN, granularity="tensor", maximum=127.5), {"strategy": "tensor"}),
        (
            replace(TOKEN, granularity="group", group_size=32, maximum=127.5),
            {"strategy": "group", "group_size": 32},
        ),
        (
            replace(TOKEN, granularity="group", group_size=64, symmetric=False),
            {"strategy": "group", "group_size": 64, "symmetric": False},
        ),
        (
            ActivationSpec(uint(4, 8), True, "token", maximum=7.5),
            {"strategy": "token", "num_bits": 4},
        ),
        (
            ActivationSpec(E4M3, True, "token", maximum=448.0),
            {"strategy": "token", "type": "float"},
        ),
        (
            ActivationSpec(E4M3, True, "group", group_size=128, maximum=448.0),
            {"strategy": "group", "group_size": 128, "type": "float"},
        ),
    ],
    ids=str,
)
def test_dynamic_scales_are_those_of_compressed_tensors(
    spec: ActivationSpec, arguments: dict[str, Any]
) -> None:
    x = tokens()
    # With no channel of either sign its zero point is 0/0 for a token of zeros.
    x[1] = 1
    expected = compressed_tensors(x, **{"num_bits": 8, "type": "int", **arguments})
    assert torch.equal(quantize_dequantize(x, spec), expected)


@pytest.mark.parametrize(
    ("spec", "arguments"),
    [
        (mx(E2M1, 3.5), {"num_bits": 4}),
        (mx(E4M3, 224.0), {"num_bits": 8}),
    ],
    ids=["mxfp4", "mxfp8"],
)
def test_powers_of_two_are_those_of_compressed_tensors(
    spec: ActivationSpec, arguments: dict[str, Any]
) -> None:
    x = tokens()
    # Values at which the exponent changes, and beside them.
    ties = torch.tensor([3.5, 7.0, 224, 448, 3.484375, 3.515625, 446, 450, 4, 6, 256])
    x[:11, 0::32] = ties.unsqueeze(1)
    x[:11, 1:32] = x[:11, 1:32].clamp(-1, 1)
    args = QuantizationArgs(
        type="float", strategy="group", group_size=32, scale_dtype=torch.uint8, **arguments
    )
    low, high = x.unflatten(1, (-1, 32)).aminmax(dim=-1)
    from compressed_tensors.quantization.utils import generate_mx_scales

    largest = torch.maximum(-low, high)
    filled = torch.where(largest == 0, 1, largest)
    exponents = generate_mx_scales(filled, num_bits=args.num_bits)
    scale = torch.exp2(exponents - 127)
    expected = fake_quantize(x, scale, torch.zeros_like(scale), args)
    assert torch.equal(quantize_dequantize(x, spec), expected)


@pytest.mark.parametrize("zero", [None, -3, 100])
def test_static_int8_is_that_of_compressed_tensors(zero: int | None) -> None:
    """Which adds the zero point before it rounds: the same but for ties over odd zero points."""
    x = tokens()
    x[1, :5] = torch.tensor([31.75, 32, -32, -32.25, 1e9])
    if zero != -3:
        x[1, 5:10] = torch.tensor([0.125, 0.375, -0.125, -0.375, 31.875])
    args = QuantizationArgs(num_bits=8, type="int", strategy="tensor", symmetric=zero is None)
    scale, point = torch.tensor([0.25]), torch.tensor([zero or 0])
    expected = fake_quantize(x, scale, point, args)
    got = quantize_dequantize(x, replace(STATIC, symmetric=zero is None), scale, point)
    assert torch.equal(got, expected)


def test_static_fp8_is_division_and_torch_s_cast() -> None:
    spec = ActivationSpec(E4M3, False, "tensor", maximum=448.0)
    x, scale = tokens(), torch.tensor([0.3])
    cast = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(quantize_dequantize(x, spec, scale), cast * scale)


@pytest.mark.needs_vllm
def test_nvfp4_is_vllm_s_up_to_rounded_reciprocals() -> None:
    """Where vLLM's code multiplies with reciprocals, another code can follow, one step apart; with
    a power of two as the scale of the tensor, only from dividing by 6."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        ref_nvfp4_quant_dequant,
    )

    x = tokens(512, 512)
    for divisor in (1.0, 16.0, 100.0, 207.0, 1344.0):
        expected = ref_nvfp4_quant_dequant(x, torch.tensor([divisor]), 16)
        got = quantize_dequantize(x, NVFP4_INPUT, 1 / torch.tensor([divisor]))
        same = (got - expected).abs() <= 1e-6 * expected.abs()
        assert float(same.double().mean()) > 0.9999
        # A neighbouring code is at most half as far as the value is large, or next to zero.
        largest = expected.unflatten(1, (-1, 16)).abs().amax(-1, keepdim=True)
        apart = (got - expected).abs().unflatten(1, (-1, 16))
        assert bool((apart <= largest / 2).all())


def test_nvfp4_by_hand() -> None:
    """g = 1/8: the largest is 13.5, t = 13.5 / 6 · 8 = 18, s = 18 / 8 = 2.25."""
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([13.5, -13.5, 1.125, 2.25 * 1.25, 2.25 * 1.75, 0.5])
    x[0, 16] = 1e-6
    got = quantize_dequantize(x, NVFP4_INPUT, torch.tensor([0.125]))
    expected = [13.5, -13.5, 1.125, 2.25, 4.5, 0.0]
    assert got[0, :6].tolist() == expected
    # t of the second group is below what e4m3 has.
    assert not got[0, 6:].any()
    # Beyond 448 the scale of a group saturates, and then its codes do.
    x[0, 0] = 6 * 448 / 8 * 4
    assert quantize_dequantize(x, NVFP4_INPUT, torch.tensor([0.125]))[0, 0] == 6 * 448 / 8


def ceil_mode(x: torch.Tensor) -> torch.Tensor:
    from vllm.model_executor.layers.quantization.utils.mxfp8_utils import (
        _mxfp8_e4m3_quantize_torch,
    )

    codes, scales = _mxfp8_e4m3_quantize_torch(x)
    scale = torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
    return codes.float() * scale


@pytest.mark.needs_vllm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mxfp8_as_vllm_computes_it(dtype: torch.dtype) -> None:
    above = float(torch.nextafter(torch.tensor(224.0), torch.tensor(math.inf)))
    x = tokens(dtype=torch.float32)
    x[:3, ::32] = torch.tensor([448.0, 450.0, 446.0]).unsqueeze(1)
    x = x.clamp(-60000, 60000).to(dtype)
    assert torch.equal(quantize_dequantize(x, mx(E4M3, above)), ceil_mode(x))


@pytest.mark.parametrize("element", FLOATS, ids=str)
def test_ocp_scales_put_the_largest_into_the_top_binade(element: ElementType) -> None:
    """The exponent of max|x| less that of the type's largest number, by Python's own frexp."""
    emax = math.frexp(element.largest)[1] - 1
    x = tokens()
    got = quantize_dequantize(x, mx(element, 2.0**emax)).unflatten(1, (-1, 32))
    for group, out in zip(x.unflatten(1, (-1, 32)).flatten(0, 1), got.flatten(0, 1), strict=True):
        largest = float(group.abs().max())
        if largest == 0:
            assert not out.any()
            continue
        scale = 2.0 ** (math.frexp(largest)[1] - 1 - emax)
        assert torch.equal(out, round_to(group / scale, element) * scale)


def quark_even(x: torch.Tensor, element: ElementType) -> torch.Tensor:
    """ "even": the largest is rounded to the type's mantissa before its exponent is taken."""
    bits = x.abs().amax(-1).view(torch.int32)
    rounded = (bits + (1 << (23 - element.mantissa - 1))) & 0x7F800000
    emax = math.frexp(element.largest)[1] - 1
    return rounded.view(torch.float32) * 2.0**-emax


@pytest.mark.parametrize(
    ("element", "maximum"), [(E2M1, 3.5), (E2M3, 3.875), (E3M2, 15.0), (E4M3, 248.0)], ids=str
)
def test_even_scales_are_a_maximum(element: ElementType, maximum: float) -> None:
    x = tokens()
    ties = maximum * torch.tensor([1.0, 2.0, 1 - 2**-8, 1 + 2**-7, 2**0.5])
    x[8:13, 0::32] = ties.unsqueeze(1)
    x[8:13, 1:] = torch.where(torch.arange(1, 256) % 32 == 0, x[8:13, 1:], x[8:13, 1:].clamp(-1, 1))
    scale = quark_even(x.unflatten(1, (-1, 32)), element).repeat_interleave(32, 1)
    safe = torch.where(scale == 0, 1, scale)
    expected = round_to(x / safe, element) * safe
    assert torch.equal(quantize_dequantize(x, mx(element, maximum)), expected)


def test_vllm_s_int8_maps_the_largest_to_127() -> None:
    x = tokens()
    largest = x.abs().amax(1, keepdim=True)
    scale = torch.where(largest == 0, 1, largest / 127)
    codes = (x / scale).double().round()
    assert codes.abs().max() == 127
    assert torch.equal(quantize_dequantize(x, TOKEN), (codes.float() * scale))


def test_static_numbers_must_be_there() -> None:
    x = torch.ones(1, 16)
    for spec in (STATIC, NVFP4_INPUT):
        with pytest.raises(ValueError, match=saying("static", "scale")):
            quantize_dequantize(x, spec)
    with pytest.raises(ValueError, match=saying("static", "zero point")):
        quantize_dequantize(x, replace(STATIC, symmetric=False), torch.ones(1))


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_hadamard_is_the_product_with_sylvester_s_matrix(block: int) -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    x = tokens(8, 128)
    expected = (x.double().unflatten(1, (-1, block)) @ matrix).flatten(1) / block**0.5
    size = x.double().abs().unflatten(1, (-1, block)).sum(-1, keepdim=True)
    error = (hadamard(x, block).double() - expected).abs().unflatten(1, (-1, block))
    assert bool((error <= 2.0**-21 * size).all())


def test_the_steps_come_in_order() -> None:
    """Transform, gather, prescale, quantize."""
    x = torch.tensor([[3.0, 1.0, 5.0, 4.0]])
    order = torch.tensor([3, -1, 0, 1])
    prescale = torch.tensor([2.0, 7.0, 0.5, 1.0])
    got = prepare_input(
        x,
        replace(STATIC, maximum=127.0),
        hadamard_block=2,
        order=order,
        prescale=prescale,
        input_scale=torch.tensor([0.5]),
    )
    root = 2**-0.5
    turned = [4 * root, 2 * root, 9 * root, 1 * root]
    taken = [turned[3] * 2, 0.0, turned[0] * 0.5, turned[1]]
    assert got.tolist() == [[round(value / 0.5) * 0.5 for value in taken]]


def test_a_limit_bounds_the_scale_as_in_vllm() -> None:
    """vLLM multiplies by the reciprocal of the scale: x in the middle of two codes may differ."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    spec = ActivationSpec(E4M3, True, "token", maximum=448.0, limit=1.5)
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    with set_current_vllm_config(VllmConfig()):
        codes, scale = QuantFP8(False, GroupShape.PER_TOKEN).forward_native(
            x, None, torch.tensor(1.5)
        )
    ours, theirs = quantize_dequantize(x, spec), codes.float() * scale
    assert float(ours.abs().max()) == 1.5
    assert float(quantize_dequantize(x, replace(spec, limit=0.0)).abs().max()) > 3
    assert float(((ours - theirs).abs() > 1e-6).float().mean()) < 1e-3
    assert torch.equal(quantize_dequantize(x, spec), quantize_dequantize(x.clamp(-1.5, 1.5), spec))


def test_limits_are_positive_and_for_dynamic_scales() -> None:
    for wrong in ({"limit": -1.0}, {"limit": math.inf}, {"limit": 1.0, "dynamic": False}):
        with pytest.raises(ValueError, match=saying("limit", "dynamic")):
            replace(STATIC if "dynamic" in wrong else TOKEN, **wrong)
