# SPDX-License-Identifier: Apache-2.0
"""Descriptors follow from facts alone: no tensor is made in this file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm.compressed_linear.checkpoint.describe import LayerContext, describe
from vllm.compressed_linear.checkpoint.facts import GroupOrder, ShardFacts
from vllm.compressed_linear.checkpoint.shard import ShardSource
from vllm.compressed_linear.spec.descriptor import ChannelOrder, ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

CONTEXT = LayerContext("bfloat16", "float16", "float32")
IN_ORDER = GroupOrder("0 0 1 1", 256, 128, reordered=False, padded=False)
FACTS = ShardFacts(IN_ORDER, "float16", ZeroSpec("integer", "uint8"))


SCHEME = CheckpointScheme(
    WeightSpec(uint(4), ScaleSpec("float16", "group", 128), ZeroSpec("integer", "uint8")),
    (StoredTensor("codes", Role.CODES, "uint8", ("N", "K")),),
)


def source(name: str, n: int = 64, padding: int = 0) -> ShardSource:
    return ShardSource(f"model.{name}", SCHEME, n, 256, 0, n, 0, 256, padding)


def test_shards_with_equal_facts_are_one_part() -> None:
    members = [source("q", 64), source("k", 32), source("v", 32, padding=8)]
    (part,) = describe([FACTS] * 3, members, CONTEXT)
    assert (part.first, part.stop, part.start) == (0, 3, 0)
    d = part.descriptor
    assert (d.n, d.in_features, d.group_size) == (136, 256, 128)
    assert (d.input_dtype, d.output_dtype, d.bias_dtype) == ("bfloat16", "float16", "float32")
    assert d.weight.zero == ZeroSpec("integer", "uint8")
    assert d.channel_order is None


@pytest.mark.parametrize(
    "other",
    [
        replace(FACTS, channels=replace(IN_ORDER, identity="0 1 1 0", reordered=True)),
        replace(FACTS, scale_dtype="bfloat16"),
        replace(FACTS, zero=ZeroSpec("float", "float16")),
        replace(FACTS, zeros_are_middle=True),
        replace(FACTS, row_scale=True),
        replace(FACTS, input_numbers=("a", "", "")),
        replace(FACTS, input_numbers=("", "", "a")),
    ],
    ids=["order", "scale dtype", "zero dtype", "middle", "row scale", "input scale", "prescale"],
)
def test_a_shard_with_another_fact_is_a_part_of_its_own(other: ShardFacts) -> None:
    members = [source("q", 64), source("k", 32), source("v", 32)]
    parts = describe([FACTS, other, other], members, CONTEXT)
    assert [(p.first, p.stop, p.start, p.descriptor.n) for p in parts] == [
        (0, 1, 0, 64),
        (1, 3, 64, 64),
    ]


def test_zero_points_in_the_middle_make_the_element_symmetric() -> None:
    (part,) = describe([replace(FACTS, zeros_are_middle=True)], [source("o")], CONTEXT)
    assert part.descriptor.weight.element == uint(4, 8)
    assert part.descriptor.weight.zero is None


def test_a_reordered_shard_has_a_channel_order_of_its_padded_length() -> None:
    order = GroupOrder("x", 288, 32, reordered=True, padded=True)
    (part,) = describe([replace(FACTS, channels=order)], [source("o")], CONTEXT)
    assert part.descriptor.channel_order == ChannelOrder(288, True)
    assert (part.descriptor.k, part.descriptor.in_features) == (288, 256)


def test_one_group_is_a_scale_per_channel() -> None:
    whole = GroupOrder("0", 256, 256, reordered=False, padded=False)
    (part,) = describe([replace(FACTS, channels=whole)], [source("o")], CONTEXT)
    assert part.descriptor.weight.scale is not None
    assert part.descriptor.weight.scale.granularity == "channel"


def test_a_prescale_is_part_of_the_descriptor() -> None:
    (part,) = describe([replace(FACTS, input_numbers=("", "", "a"))], [source("o")], CONTEXT)
    assert part.descriptor.prescale == "float32"
