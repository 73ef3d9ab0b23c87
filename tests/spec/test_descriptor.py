# SPDX-License-Identifier: Apache-2.0
"""Descriptors are values: they survive JSON, hash, print in one line and refuse contradictions."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.messages import saying
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    ChannelOrder,
    CompressedLinearDescriptor,
    ScaleSpec,
    TransformSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import E2M1, INT8, ElementType, uint
from vllm.compressed_linear.testing import conformance_cases

DTYPES = st.sampled_from(["bfloat16", "float16", "float32"])
ELEMENTS = st.sampled_from(
    [uint(4, 8), uint(3), elements.E4M3, elements.E2M1, ElementType("c", 1, codebook=(-1.0, 2.5))]
)


ACTIVATIONS = [
    ActivationSpec(INT8, True, "token"),
    ActivationSpec(INT8, False, "tensor", symmetric=False, maximum=127.5),
    ActivationSpec(elements.E4M3, True, "group", group_size=128, maximum=448),
    ActivationSpec(E2M1, True, "group", group_size=16, scale_dtype="float8_e4m3fn", maximum=6),
    ActivationSpec(E2M1, True, "group", group_size=32, scale_dtype="e8m0", maximum=3.5),
]


STATIC = [activation for activation in ACTIVATIONS if not activation.dynamic]


@st.composite
def descriptors(draw: st.DrawFn) -> CompressedLinearDescriptor:
    group = draw(st.sampled_from([-1, 16, 32]))
    groups = draw(st.integers(1, 4))
    k = group * groups if group > 0 else draw(st.integers(1, 500))
    order = draw(st.sampled_from([None, ChannelOrder(k), ChannelOrder(k, padded=True)]))
    activation = draw(st.sampled_from(ACTIVATIONS))
    return CompressedLinearDescriptor(
        in_features=k - 1 if order and order.padded else k,
        out_features=draw(st.integers(0, 297)),
        weight=WeightSpec(
            draw(ELEMENTS),
            ScaleSpec(draw(DTYPES), "group" if group > 0 else "channel", group),
            draw(st.sampled_from([None, ZeroSpec("integer", "uint8")])),
            draw(st.sampled_from([None, "float32"])),
        ),
        input_dtype=draw(DTYPES),
        output_dtype=draw(DTYPES),
        bias_dtype=draw(st.one_of(st.none(), DTYPES)),
        channel_order=order,
        activation=draw(st.sampled_from([None, activation])),
        prescale=draw(st.one_of(st.none(), DTYPES)),
        transform=draw(st.sampled_from([None, TransformSpec("hadamard", "input", 1)])),
        output_activation=draw(st.sampled_from([None, *STATIC])),
    )


@given(descriptors())
def test_json_gives_back_an_equal_descriptor(descriptor: CompressedLinearDescriptor) -> None:
    text = json.dumps(descriptor.to_json())
    back = CompressedLinearDescriptor.from_json(json.loads(text))
    assert back == descriptor
    assert hash(back) == hash(descriptor)
    assert str(back) == str(descriptor)
    assert pickle.loads(pickle.dumps(descriptor)) == descriptor


@given(descriptors())
def test_prints_in_one_line_that_names_shape_and_element(d: CompressedLinearDescriptor) -> None:
    text = str(d)
    assert "\n" not in text
    assert text.startswith(f"{d.n}x{d.k}, {d.weight.element}, ")
    assert (d.activation is not None) == ("x as" in text)
    assert (d.channel_order is not None) == ("reordered K" in text)


def test_reads_well() -> None:
    weight = WeightSpec(uint(4), ScaleSpec("bfloat16", "group", 128), ZeroSpec("integer", "uint8"))
    d = CompressedLinearDescriptor(256, 512, weight, "bfloat16", "bfloat16")
    assert str(d) == ("512x256, uint4, g128, bfloat16 scale, integer zero, bfloat16 → bfloat16")
    assert (d.k, d.n, d.groups, d.group_size) == (256, 512, 2, 128)


def test_every_field_counts_for_equality() -> None:
    weight = WeightSpec(uint(4), ScaleSpec("bfloat16", "group", 128))
    d = CompressedLinearDescriptor(256, 512, weight, "bfloat16", "bfloat16")
    changed = [
        replace(d, in_features=128),
        replace(d, out_features=256),
        replace(d, weight=replace(weight, element=uint(4, 8))),
        replace(d, weight=replace(weight, zero=ZeroSpec("float", "float16"))),
        replace(d, input_dtype="float16"),
        replace(d, output_dtype="float16"),
        replace(d, bias_dtype="float16"),
        replace(d, channel_order=ChannelOrder(256)),
        replace(d, prescale="float32"),
        replace(d, transform=TransformSpec("hadamard", "input", 64)),
        replace(d, weight=replace(weight, row_scale="float32")),
        *(replace(d, activation=activation) for activation in ACTIVATIONS),
        replace(d, activation=replace(ACTIVATIONS[0], maximum=127.5)),
    ]
    assert len({d, *changed}) == len(changed) + 1


def test_the_kernel_s_channels_are_the_gathered_ones() -> None:
    weight = WeightSpec(uint(4), ScaleSpec("bfloat16", "group", 32))
    d = CompressedLinearDescriptor(
        100, 8, weight, "bfloat16", "bfloat16", channel_order=ChannelOrder(128, padded=True)
    )
    assert (d.in_features, d.k, d.groups) == (100, 128, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_features": -1}, ("negative",)),
        ({"in_features": 40}, ("K=40", 32)),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], message: tuple[object, ...]) -> None:
    weight = WeightSpec(uint(4), ScaleSpec("bfloat16", "group", 32))
    d = CompressedLinearDescriptor(64, 8, weight, "bfloat16", "bfloat16")
    with pytest.raises(ValueError, match=saying(*message)):
        replace(d, **change)  # type: ignore[arg-type]


def test_parts_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match=saying("granularity", "'row'")):
        ScaleSpec("float16", "row")
    with pytest.raises(ValueError, match=saying("group size", 0)):
        ScaleSpec("float16", "group", 0)
    with pytest.raises(ValueError, match=saying("blocks of 128")):
        ScaleSpec("float16", "group", 128, 128)
    with pytest.raises(ValueError, match=saying("zero point", "'fuzzy'")):
        ZeroSpec("fuzzy", "float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"element": uint(8)}, ("activation uint8", 0)),
        ({"element": elements.BF16}, ("activation bf16",)),
        ({"granularity": "row"}, ("granularity", "'row'")),
        ({"granularity": "group"}, ("group size", -1)),
        ({"group_size": 32}, ("group size", 32, "token")),
        ({"dynamic": False}, ("static", "token")),
        ({"element": elements.E4M3, "symmetric": False}, ("zero points",)),
        ({"scale_dtype": "float16"}, ("scale", "float16", "float32", "e8m0")),
        ({"scale_dtype": "e8m0"}, ("e8m0",)),
        ({"maximum": 0.0}, ("maximum", "0.0", "positive")),
    ],
)
def test_contradicting_activations_are_refused(
    change: dict[str, object], message: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=saying(*message)):
        replace(ActivationSpec(INT8, True, "token"), **change)  # type: ignore[arg-type]


def test_activations_say_what_they_are_and_need() -> None:
    told = {
        str(a): (a.kind, a.needs_scale, a.needs_zero)
        for a in (*ACTIVATIONS, ActivationSpec(INT8, False, "tensor"))
    }
    assert told == {
        "int8 dynamic per token, maximum 127": ("int8 dynamic per token", False, False),
        "int8 static per tensor, asymmetric, maximum 127.5": (
            "int8 static per tensor, asymmetric",
            True,
            True,
        ),
        "e4m3 dynamic per group of 128, maximum 448": ("e4m3 dynamic per group", False, False),
        "e2m1 dynamic per group of 16 with e4m3 scales, maximum 6": (
            "e2m1 dynamic per group with e4m3 scales",
            True,
            False,
        ),
        "e2m1 dynamic per group of 32 with e8m0 scales, maximum 3.5": (
            "e2m1 dynamic per group with e8m0 scales",
            False,
            False,
        ),
        "int8 static per tensor, maximum 127": ("int8 static per tensor", True, False),
    }


@pytest.mark.parametrize(
    "change", [{"kind": "rotation"}, {"side": "output"}, {"block": 0}, {"block": 96}], ids=str
)
def test_unknown_transforms_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"known: hadamard, input|expected a power of two"):
        replace(TransformSpec("hadamard", "input", 64), **change)  # type: ignore[arg-type]


def test_descriptors_of_real_weights_go_through_json() -> None:
    for case in conformance_cases()[::7]:
        d = case.build().descriptor
        assert CompressedLinearDescriptor.from_json(d.to_json()) == d
