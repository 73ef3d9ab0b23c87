# SPDX-License-Identifier: Apache-2.0
"""The cases of the conformance kit."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.activation import nvfp4_input
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    INT8,
    ElementType,
    dtype_name,
    uint,
)
from vllm.compressed_linear.testing.case import DATA, WIDE
from vllm.compressed_linear.testing.oracle import Case


def _powers(bits: int) -> ElementType:
    """A codebook of signed powers of two, which are exact in every dtype."""
    half = [2.0**-power for power in range(1 << (bits - 1))]
    return ElementType(f"powers{bits}", bits, codebook=(*(-v for v in half), *half[::-1]))


def _symmetric(bits: int) -> ElementType:
    return uint(bits, 1 << (bits - 1))


def conformance_cases() -> list[Case]:
    """Every kind of weight separately, then a fixed sample of combinations."""
    int4 = Case(_symmetric(4))
    cases = [
        Case(uint(bits) if zero else _symmetric(bits), zero=zero)
        for bits in range(1, 9)
        for zero in (None, "integer", "float")
    ]
    cases += [
        Case(element)
        for element in (
            elements.NF4,
            *elements.SMALL_FLOATS,
            *(_powers(bits) for bits in (2, 3, 5)),
        )
    ]
    cases += [
        Case(element, 40, 96, input_dtype=dtype_name(element.dense_dtype), bias_dtype=bias)
        for element in (elements.BF16, elements.FP16, elements.FP32)
        for bias in (None, dtype_name(element.dense_dtype))
    ]
    cases += [
        Case(elements.BF16, 33, 47),
        Case(elements.BF16, 1, 1),
        Case(elements.BF16, 40, 96, input_dtype="float32"),
        Case(elements.BF16, data="spread"),
    ]
    # N and K: 1, odd sizes, and sizes next to multiples of tiles.
    cases += [
        replace(int4, n=n, k=k, group=-1, shards=())
        for n, k in ((1, 1), (1, 64), (2, 3), (17, 8), (31, 33), (65, 130), (130, 257), (300, 40))
    ]
    cases += [
        replace(int4, n=33, k=k, group=group, shards=(), zero=zero, element=element)
        for k, group in ((32, 32), (80, 16), (96, 24), (144, 48), (40, 8), (20, 4), (256, 64))
        for zero, element in ((None, _symmetric(4)), ("integer", uint(4)))
    ]
    cases += [replace(int4, k=512, group=group) for group in (16, 64, 128, 256, -1, 0)]
    cases += [
        replace(int4, scale_dtype=scale, input_dtype=x, output_dtype="", zero=zero, element=e)
        for scale, x in itertools.product(WIDE, WIDE)
        for zero, e in ((None, _symmetric(4)), ("float", uint(4)))
    ]
    cases += [
        replace(int4, input_dtype="bfloat16", output_dtype="float32"),
        replace(int4, bias_dtype="bfloat16"),
        replace(int4, bias_dtype="float32"),
        replace(int4, bias_dtype="float16", input_dtype="float16", output_dtype=""),
        replace(int4, bias_dtype="float32", input_dtype="float32", output_dtype=""),
        replace(int4, n=56, shards=(32, 16, 8)),
        replace(int4, n=37, shards=(19, 11, 7), bias_dtype="bfloat16"),
        replace(int4, n=37, shards=(19, 11, 7), element=uint(4), zero="integer"),
    ]
    for order in ("cut", "act", "ragged"):
        cases += [
            replace(int4, order=order),
            replace(int4, order=order, element=uint(4), zero="integer", bias_dtype="bfloat16"),
            replace(int4, order=order, element=uint(3), zero="integer", n=33, k=120, shards=()),
        ]
    cases += [replace(int4, k=100, group=32), replace(int4, k=144, group=64)]
    for data in DATA[1:]:
        cases += [
            replace(int4, data=data),
            replace(int4, data=data, element=uint(4), zero="integer"),
            replace(int4, data=data, element=uint(8), zero="integer", scale_dtype="float16"),
            replace(int4, data=data, input_dtype="float32", output_dtype="", scale_dtype="float32"),
        ]
    cases += _sample(80)
    cases += _float_cases()
    cases += _activation_cases()
    return list(dict.fromkeys(cases))


NVFP4 = Case(E2M1, group=16, scale_dtype="float8_e4m3fn", row_scale="tensor")


MXFP4 = Case(E2M1, scale_dtype="e8m0")


FP8 = Case(E4M3, group=-1, scale_dtype="float32")


FP8_BLOCK = Case(E4M3, 160, 256, group=128, scale_dtype="float32", block_rows=128)


def _float_cases() -> list[Case]:
    """Small floats with the scales of checkpoints, and second-level scales."""
    cases = [
        replace(base, element=element)
        for base in (FP8, FP8_BLOCK, replace(FP8, group=0), replace(FP8, scale_dtype="bfloat16"))
        for element in (E4M3, E5M2)
    ]
    cases += [replace(MXFP4, element=e) for e in (E5M2, E4M3, E3M2, E2M3, E2M1, _symmetric(8))]
    cases += [
        replace(NVFP4, row_scale="channel"),
        replace(NVFP4, n=33, k=80, shards=(), bias_dtype="float32"),
        Case(_symmetric(4), row_scale="channel"),
        Case(uint(4), zero="integer", row_scale="tensor", scale_dtype="float32"),
        Case(uint(3), zero="float", row_scale="channel", order="ragged"),
        Case(elements.NF4, group=64, scale_dtype="float32", row_scale="channel"),
        Case(E4M3, 56, 96, block_rows=16, shards=(24, 24, 8)),
    ]
    for base in (NVFP4, MXFP4, replace(FP8_BLOCK, n=40, k=96, group=32, block_rows=16, shards=())):
        cases += [replace(base, data=data) for data in DATA]
        cases += [replace(base, input_dtype=x, output_dtype="") for x in WIDE]
        cases += [replace(base, n=37, shards=(19, 11, 7)), replace(base, order="cut")]
        cases += [replace(base, n=1, k=32, group=min(base.group, 16), shards=())]
    cases += [replace(NVFP4, order=order) for order in ("act", "ragged")]
    return cases


INT8_TOKEN = ActivationSpec(INT8, True, "token")


_STATIC = replace(INT8_TOKEN, dynamic=False, granularity="tensor")


_FP8_TOKEN = ActivationSpec(E4M3, True, "token", maximum=448.0)


def mx(element: ElementType, maximum: float) -> ActivationSpec:
    """Microscaling activations: groups of 32 under powers of two."""
    return ActivationSpec(
        element, True, "group", group_size=32, scale_dtype="e8m0", maximum=maximum
    )


NVFP4_INPUT = nvfp4_input()


def _activation_cases() -> list[Case]:
    """Every kind of quantized activations with the weights it comes with, and other preparation of
    x. Results in fp32 show differences that bf16 would round away."""
    int8 = Case(_symmetric(8), group=-1, scale_dtype="float32", output_dtype="float32")
    int4 = replace(int8, element=_symmetric(4), group=32)
    grouped = replace(INT8_TOKEN, granularity="group", group_size=32)
    integers = [
        INT8_TOKEN,
        _STATIC,
        grouped,
        replace(INT8_TOKEN, granularity="tensor"),
        replace(INT8_TOKEN, maximum=127.5),
        *(replace(a, symmetric=False) for a in (INT8_TOKEN, _STATIC, grouped)),
        ActivationSpec(_symmetric(4), True, "token", maximum=7.0),
    ]
    cases = [
        replace(base, activation=activation)
        for activation in integers
        for base in (int8, int4, replace(int4, element=uint(4), zero="integer"))
    ]
    fp8 = replace(FP8, output_dtype="float32")
    static = replace(_FP8_TOKEN, dynamic=False, granularity="tensor")
    blocks = replace(_FP8_TOKEN, granularity="group", group_size=128)
    cases += [
        replace(fp8, activation=_FP8_TOKEN),
        replace(fp8, activation=static),
        replace(fp8, element=E5M2, activation=replace(_FP8_TOKEN, element=E5M2, maximum=57344.0)),
        replace(int4, activation=_FP8_TOKEN),
        replace(int4, activation=static, row_scale="tensor", prescale=True),
        replace(FP8_BLOCK, output_dtype="float32", activation=blocks),
        replace(FP8_BLOCK, n=384, shards=(256, 128), activation=blocks),
        replace(FP8_BLOCK, k=320, group=64, activation=blocks),
    ]
    for x in WIDE:
        small = replace(MXFP4, input_dtype=x, output_dtype="float32")
        cases += [
            replace(NVFP4, input_dtype=x, output_dtype="float32", activation=NVFP4_INPUT),
            *(replace(small, activation=mx(E2M1, maximum)) for maximum in (4.0, 3.5)),
            replace(small, element=E3M2, activation=mx(E3M2, 15.0)),
            replace(small, element=E2M3, activation=mx(E2M3, 4.0)),
            replace(small, element=E4M3, activation=mx(E4M3, 256.0)),
            replace(small, element=E5M2, activation=mx(E5M2, 32768.0)),
            replace(int8, input_dtype=x, activation=INT8_TOKEN),
            replace(int8, input_dtype=x, output_dtype=x, activation=_STATIC, bias_dtype=x),
        ]
    for data in DATA[1:]:
        cases += [
            replace(int8, data=data, activation=INT8_TOKEN),
            replace(int8, data=data, activation=replace(INT8_TOKEN, symmetric=False)),
            replace(NVFP4, data=data, activation=NVFP4_INPUT),
            replace(MXFP4, data=data, activation=mx(E2M1, 4.0)),
        ]
    cases += [
        replace(int4, order=order, activation=activation)
        for order in ("cut", "act", "ragged")
        for activation in (INT8_TOKEN, grouped)
    ]
    cases += [
        replace(int8, n=37, k=75, shards=(19, 11, 7), activation=INT8_TOKEN, bias_dtype="bfloat16"),
        replace(int8, n=37, k=75, shards=(19, 11, 7), activation=grouped),
        replace(int4, prescale=True),
        replace(int4, prescale=True, order="ragged"),
        replace(int4, prescale=True, order="act", activation=INT8_TOKEN),
        replace(int4, hadamard=64),
        replace(int4, output=ActivationSpec(INT8, False, "tensor"), bias_dtype="bfloat16"),
        replace(int4, output=ActivationSpec(INT8, False, "tensor", False), activation=INT8_TOKEN),
        replace(int4, hadamard=32, order="act", prescale=True, activation=INT8_TOKEN),
        replace(NVFP4, hadamard=16, output_dtype="float32", activation=NVFP4_INPUT),
    ]
    return cases


def _sample(count: int) -> list[Case]:
    """Combinations of everything, drawn with a fixed seed."""
    draw = random.Random(8913)
    cases: list[Case] = []
    while len(cases) < count:
        bits = draw.randint(1, 8)
        zero = draw.choice((None, "integer", "float"))
        group = draw.choice((-1, 4, 16, 20, 32, 32, 64, 128))
        order = draw.choice(("plain", "plain", "cut", "act", "ragged"))
        groups = draw.randint(1, 5)
        k = draw.randint(1, 300) if group == -1 else group * groups
        if order != "plain" and (group == -1 or groups == 1):
            continue
        x = draw.choice(WIDE)
        cases.append(
            Case(
                _symmetric(bits) if zero is None else uint(bits),
                n=draw.choice((draw.randint(1, 140), 32 * draw.randint(1, 6))),
                k=k,
                group=group,
                zero=zero,
                scale_dtype=draw.choice(WIDE),
                input_dtype=x,
                bias_dtype=draw.choice((None, x)),
                order=order,
                data=draw.choice(("random", "random", "signed", "spread", "dead")),
            )
        )
    return cases
