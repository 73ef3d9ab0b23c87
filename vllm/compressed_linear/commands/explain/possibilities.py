# SPDX-License-Identifier: Apache-2.0
"""Enumerate the descriptors that a layer may have before its values are read.

Two things are decided by values only: whether a group index reorders channels (and whether all
shards of a fused layer are reordered in the same way), and whether all zero points are the middle
code. Each combination is assumed in turn and described by the rules for loaded weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from vllm.compressed_linear.checkpoint.channels import gather_channels
from vllm.compressed_linear.checkpoint.describe import LayerContext, describe
from vllm.compressed_linear.checkpoint.facts import (
    GroupOrder,
    ShardFacts,
    channel_gather,
    read_facts,
    stated_facts,
)
from vllm.compressed_linear.checkpoint.parts import data_notes
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.commands.explain.explanation import PartPlan, Possibility
from vllm.compressed_linear.commands.explain.tensors import LayerTensors, ReadTensor, load_shards
from vllm.compressed_linear.formats.base import Hints
from vllm.compressed_linear.prepare.layer import checkpoint_bytes
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.scheme import Role

MIXED_SHARDS = 3
"""Up to this many shards with unknown facts, combinations in which shards differ are included."""


def read_possibility(
    layer: str,
    sources: Sequence[ShardSource],
    context: LayerContext,
    tensors: LayerTensors,
    read: ReadTensor,
) -> Possibility:
    """The possibility that the data decides. Codes are read only if a scale is 0, to see whether
    weights were lost. Raises ``CheckpointError`` on damaged data."""
    shards = load_shards(layer, sources, tensors, read)
    scales = [shard.scale() for shard in shards]
    if any(scale is not None and bool((scale == 0).any()) for scale in scales):
        shards = load_shards(layer, sources, tensors, read, codes=True)
    facts = [read_facts(shard)[0] for shard in shards]
    return Possibility((), True, _parts(facts, shards, context))


def possibilities(
    shards: Sequence[LoadedShard], context: LayerContext, hints: Hints
) -> tuple[Possibility, ...]:
    """All possibilities for ``shards`` of meta tensors, the likely one first; equal results are
    merged."""
    indexed = [i for i, s in enumerate(shards) if s.stored(Role.GROUP_INDEX) and _groups(s) > 1]
    zeroed = [
        i
        for i, s in enumerate(shards)
        if s.stored(Role.ZERO) and s.source.scheme.weight.element.kind == "integer"
    ]
    stated = [stated_facts(shard, _order(shard, 0), middle=False) for shard in shards]
    found: dict[tuple[PartPlan, ...], Possibility] = {}
    for orders in _orders(len(indexed)):
        ordered = list(stated)
        for i, order in zip(indexed, orders, strict=True):
            ordered[i] = replace(stated[i], channels=_order(shards[i], order))
        for middles in _middles(len(zeroed)):
            facts = list(ordered)
            for i, middle in zip(zeroed, middles, strict=True):
                facts[i] = replace(ordered[i], zeros_are_middle=middle)
            parts = _parts(facts, shards, context)
            texts = (
                _order_text([_short(shards[i]) for i in indexed], orders),
                _zero_text([shards[i] for i in zeroed], middles),
            )
            likely = all(order == (1 if hints.reordered else 0) for order in orders) and all(
                middle == hints.symmetric for middle in middles
            )
            possibility = Possibility(
                (" and ".join(filter(None, texts)),) if any(texts) else (),
                likely,
                parts,
                len({order > 0 for order in orders}) < 2
                and max(orders, default=0) < 2
                and len(set(middles)) < 2,
                any(orders) and any(_depends_on_order(p.descriptor) for p in parts),
            )
            known = found.get(parts)
            found[parts] = possibility if known is None else _merged(known, possibility)
    if len(found) == 1:
        return (replace(next(iter(found.values())), facts=(), likely=True),)
    return tuple(sorted(found.values(), key=lambda p: not p.likely))


def _order(shard: LoadedShard, number: int) -> GroupOrder | None:
    """Order ``number`` of the channels of ``shard``: 0 is in order, others are assumed. A shard
    without a group index has the order of its position."""
    source = shard.source
    if source.scheme.weight.scale is None or not source.k:
        return None
    if shard.stored(Role.GROUP_INDEX) is None:
        gather = channel_gather(shard)
        return None if gather is None else GroupOrder.of(gather)
    index = torch.arange(source.full_k) // source.scheme.weight.group_size(source.full_k)
    if number:
        generator = torch.Generator().manual_seed(number)
        index = index[torch.randperm(source.full_k, generator=generator)]
    return GroupOrder.of(gather_channels(index[source.k_start : source.k_start + source.k]))


def _merged(one: Possibility, two: Possibility) -> Possibility:
    facts = tuple(dict.fromkeys((*one.facts, *two.facts)))
    return replace(
        one,
        facts=facts,
        likely=one.likely or two.likely,
        uniform=one.uniform or two.uniform,
        from_sample=one.from_sample or two.from_sample,
    )


def _depends_on_order(descriptor: CompressedLinearDescriptor) -> bool:
    """Whether another order of channels could need other padding of groups."""
    return descriptor.channel_order is not None and descriptor.channel_order.padded


def _parts(
    facts: Sequence[ShardFacts], shards: Sequence[LoadedShard], context: LayerContext
) -> tuple[PartPlan, ...]:
    return tuple(
        PartPlan(
            part.start,
            tuple(_short(shard) for shard in shards[part.first : part.stop]),
            part.descriptor,
            checkpoint_bytes(shards[part.first : part.stop]),
            notes=data_notes(
                facts[part.first : part.stop],
                [shard.source for shard in shards[part.first : part.stop]],
            ),
        )
        for part in describe(facts, [shard.source for shard in shards], context)
    )


def _short(shard: LoadedShard) -> str:
    return shard.source.name.rpartition(".")[2]


def _groups(shard: LoadedShard) -> int:
    return shard.source.extents["G"]


def _orders(count: int) -> Iterator[tuple[int, ...]]:
    """For each shard 0 (in order) or the number of an order; equal numbers are equal orders. Only
    neighbours matter, so a number is 1 more than, or the same as, that of a reordered neighbour."""
    if count > MIXED_SHARDS:
        yield from ((0,) * count, (1,) * count)
        return

    def extend(orders: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(orders) == count:
            yield orders
            return
        new = max(orders, default=0) + 1
        choices = [0, new]
        if orders and orders[-1]:
            choices.insert(1, orders[-1])
        for choice in choices:
            yield from extend((*orders, choice))

    yield from extend(())


def _middles(count: int) -> Iterator[tuple[bool, ...]]:
    if count > MIXED_SHARDS:
        yield from ((True,) * count, (False,) * count)
    else:
        yield from itertools.product((True, False), repeat=count)


def _order_text(names: list[str], orders: tuple[int, ...]) -> str:
    if not orders:
        return ""
    if not any(orders):
        return "g_idx is in order"
    if len(set(orders)) == 1:
        return "g_idx reorders channels" + (" alike in all shards" if len(orders) > 1 else "")
    runs = [
        (order, [name for _, name in run])
        for order, run in itertools.groupby(
            zip(orders, names, strict=True), key=lambda pair: pair[0]
        )
    ]
    return "g_idx " + ", ".join(
        f"{'reorders' if order else 'is in order in'} {' + '.join(run)}"
        + (" alike" if order and len(run) > 1 else "")
        for order, run in runs
    )


def _zero_text(shards: Sequence[LoadedShard], middles: tuple[bool, ...]) -> str:
    if not middles:
        return ""
    codes = {1 << (shard.source.scheme.weight.element.bits - 1) for shard in shards}
    middle = str(codes.pop()) if len(codes) == 1 else "the middle code"
    if all(middles):
        return f"zero points are all {middle}"
    if not any(middles):
        return f"zero points are not all {middle}"
    names = {
        value: " + ".join(_short(s) for s, m in zip(shards, middles, strict=True) if m is value)
        for value in (True, False)
    }
    return f"zero points are all {middle} in {names[True]}, but not in {names[False]}"
