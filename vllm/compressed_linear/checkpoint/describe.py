# SPDX-License-Identifier: Apache-2.0
"""From facts to descriptors, without tensors.

A trivial ``g_idx`` is dropped, zero points that all equal the middle code become a symmetric
element type, scales get the dtype they were stored in, and consecutive shards with equal facts
become one descriptor. Shards that differ become several parts. All of these are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm.compressed_linear.checkpoint.facts import GroupOrder, ShardFacts
from vllm.compressed_linear.checkpoint.shard import ShardSource
from vllm.compressed_linear.spec.descriptor import (
    ChannelOrder,
    CompressedLinearDescriptor,
    ScaleSpec,
    WeightSpec,
)
from vllm.compressed_linear.spec.elements import uint


@dataclass(frozen=True)
class LayerContext:
    """Properties of a layer other than its weights: dtypes, and whether its rows are looked up, as
    in an embedding table."""

    input_dtype: str
    output_dtype: str
    bias_dtype: str | None = None
    lookup: bool = False


@dataclass(frozen=True)
class DescribedPart:
    """Shards [first, stop) of a layer: output columns [start, start + descriptor.n)."""

    first: int
    stop: int
    start: int
    descriptor: CompressedLinearDescriptor


def describe(
    facts: Sequence[ShardFacts], sources: Sequence[ShardSource], context: LayerContext
) -> list[DescribedPart]:
    """Parts of a layer whose shards have ``facts``, in the order of the shards."""
    specs = [_refined(source.scheme.weight, f) for source, f in zip(sources, facts, strict=True)]

    def same(a: int, b: int) -> bool:
        """Whether one backend call can compute both: equal weights, orders, and treatment of x."""
        one, two = sources[a].scheme, sources[b].scheme
        return (
            specs[a] == specs[b]
            and facts[a].channels == facts[b].channels
            and facts[a].input_numbers == facts[b].input_numbers
            and facts[a].output_numbers == facts[b].output_numbers
            and facts[a].off == facts[b].off
            and (one.activation, one.transform) == (two.activation, two.transform)
            and one.output_activation == two.output_activation
        )

    parts: list[DescribedPart] = []
    first = start = 0
    for stop in range(1, len(sources) + 1):
        if stop < len(sources) and same(first, stop):
            continue
        members = sources[first:stop]
        n = sum(source.n + source.padding for source in members)
        channels, scheme = facts[first].channels, members[0].scheme
        descriptor = CompressedLinearDescriptor(
            in_features=members[0].k,
            out_features=n,
            weight=_with_blocks(specs[first], members, channels),
            input_dtype=context.input_dtype,
            output_dtype=context.output_dtype,
            bias_dtype=context.bias_dtype,
            channel_order=(
                ChannelOrder(channels.k, channels.padded)
                if channels is not None and channels.reordered
                else None
            ),
            activation=None if facts[first].off[0] else scheme.activation,
            prescale="float32" if facts[first].prescaled else None,
            transform=scheme.transform,
            lookup=context.lookup,
            output_activation=None if facts[first].off[1] else scheme.output_activation,
        )
        parts.append(DescribedPart(first, stop, start, descriptor))
        start += n
        first = stop
    return parts


def _refined(stated: WeightSpec, facts: ShardFacts) -> WeightSpec:
    """The weight of the scheme, made exact by the facts."""
    spec = replace(stated, row_scale="float32" if facts.row_scale else None)
    if facts.scale_dtype is None or spec.scale is None:
        return spec
    granularity, size = spec.scale.granularity, -1
    if facts.channels is not None:
        granularity = "group" if facts.channels.groups > 1 else "channel"
        size = facts.channels.group_size if granularity == "group" else -1
    scale = ScaleSpec(facts.scale_dtype, granularity, size)
    if facts.zeros_are_middle and spec.element.kind == "integer":
        bits = spec.element.bits
        return replace(spec, element=uint(bits, 1 << (bits - 1)), scale=scale, zero=None)
    return replace(spec, scale=scale, zero=facts.zero)


def _with_blocks(
    spec: WeightSpec, sources: Sequence[ShardSource], channels: GroupOrder | None
) -> WeightSpec:
    """``spec`` of a part of ``sources``, with blocks of rows if they share scales."""
    rows = _block_rows(sources)
    if rows == 1 or channels is None or spec.scale is None or spec.zero is not None:
        return spec
    return replace(spec, scale=ScaleSpec(spec.scale.dtype, "block", channels.group_size, rows))


def _block_rows(sources: Sequence[ShardSource]) -> int:
    """Number of rows that share scales, counted from the first row of all ``sources`` together; 1
    if one of them begins in the middle of a block, or its slice cuts one, or padding completes one.

    Only whole members may end with a short block: a slice that ends with one begins with one on
    another rank, and the result must not depend on the rank.
    """
    rows = sources[0].block_rows
    offset = 0
    for source in sources:
        begins = offset % rows == 0 and source.n_start % rows == 0
        whole = source.n == source.full_n and not source.padding
        if source.block_rows != rows or not begins or not (whole or source.n % rows == 0):
            return 1
        offset += source.n + source.padding
    return rows
