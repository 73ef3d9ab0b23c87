# SPDX-License-Identifier: Apache-2.0
"""What headers leave open about a layer, and every descriptor it can turn into.

Two things are decided by values only: whether a group index reorders channels (and whether the
shards of a fused layer are reordered alike), and whether all zero points are the middle code. Each
combination is supposed in turn and given to the same ``refine`` that sees the loaded weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from vllm.compressed_linear.checkpoint.facts import LayerContext, refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.commands.explain.tensors import LayerTensors, ReadTensor, load_shards
from vllm.compressed_linear.formats.base import Hints
from vllm.compressed_linear.prepare.layer import checkpoint_bytes
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.scheme import Role

MIXED_SHARDS = 3
"""Up to this many shards with open facts, shards that differ among themselves are supposed too."""


@dataclass(frozen=True)
class PartShape:
    """A run of shards that one backend would compute. ``shards``: last parts of their names."""

    start: int
    shards: tuple[str, ...]
    descriptor: CompressedLinearDescriptor
    bytes_checkpoint: int


@dataclass(frozen=True)
class Case:
    """What a layer is if one of ``facts`` holds (each a sentence; empty: it is so for sure).

    ``likely``: it is so if the configuration tells the truth. ``uniform``: one of the facts is the
    same for all shards. ``from_sample``: the order was made up and K depends on the real one.
    """

    facts: tuple[str, ...]
    likely: bool
    parts: tuple[PartShape, ...]
    uniform: bool = True
    from_sample: bool = False


def read_case(
    layer: str,
    sources: Sequence[ShardSource],
    context: LayerContext,
    tensors: LayerTensors,
    read: ReadTensor,
) -> Case:
    """The one case that the data leaves. Codes are read only where a scale is 0, to see whether
    weights were lost. Raises ``CheckpointError`` on damaged data."""
    shards = load_shards(layer, sources, tensors, read)
    scales = [shard.scale() for shard in shards]
    if any(scale is not None and bool((scale == 0).any()) for scale in scales):
        shards = load_shards(layer, sources, tensors, read, codes=True)
    return Case((), True, _parts(shards, context))


def cases(shards: Sequence[LoadedShard], context: LayerContext, hints: Hints) -> tuple[Case, ...]:
    """Every case, the likely one first; cases with the same result are one."""
    indexed = [i for i, s in enumerate(shards) if s.stored(Role.GROUP_INDEX) and _groups(s) > 1]
    zeroed = [
        i
        for i, s in enumerate(shards)
        if s.stored(Role.ZERO) and s.source.scheme.weight.element.kind == "integer"
    ]
    supposed = [_Supposed(shard) for shard in shards]
    found: dict[tuple[PartShape, ...], Case] = {}
    for orders in _orders(len(indexed)):
        for middles in _middles(len(zeroed)):
            for i, order in zip(indexed, orders, strict=True):
                supposed[i].order = order
            for i, middle in zip(zeroed, middles, strict=True):
                supposed[i].middle = middle
            parts = _parts(supposed, context)
            texts = (
                _order_text([_short(shards[i]) for i in indexed], orders),
                _zero_text([shards[i] for i in zeroed], middles),
            )
            likely = all(order == (1 if hints.reordered else 0) for order in orders) and all(
                middle == hints.symmetric for middle in middles
            )
            case = Case(
                (" and ".join(filter(None, texts)),) if any(texts) else (),
                likely,
                parts,
                len({order > 0 for order in orders}) < 2
                and max(orders, default=0) < 2
                and len(set(middles)) < 2,
                any(orders) and any(_depends_on_order(p.descriptor) for p in parts),
            )
            known = found.get(parts)
            found[parts] = case if known is None else _merged(known, case)
    if len(found) == 1:
        return (replace(next(iter(found.values())), facts=(), likely=True),)
    return tuple(sorted(found.values(), key=lambda case: not case.likely))


def _merged(one: Case, two: Case) -> Case:
    facts = tuple(dict.fromkeys((*one.facts, *two.facts)))
    return replace(
        one,
        facts=facts,
        likely=one.likely or two.likely,
        uniform=one.uniform or two.uniform,
        from_sample=one.from_sample or two.from_sample,
    )


def _depends_on_order(descriptor: CompressedLinearDescriptor) -> bool:
    """Whether another order of channels could need another filling up of groups."""
    return descriptor.channel_order is not None and descriptor.channel_order.padded


def _parts(shards: Sequence[LoadedShard], context: LayerContext) -> tuple[PartShape, ...]:
    return tuple(
        PartShape(
            part.start,
            tuple(_short(shard) for shard in part.weights.shards),
            part.descriptor,
            checkpoint_bytes(part.weights),
        )
        for part in refine(shards, context)
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


class _Supposed(LoadedShard):
    """A shard of meta tensors with supposed values: a group index, or None for its own, and whether
    its zero points are all the middle code. Scales and zero points are single numbers that stand
    for all of them."""

    def __init__(self, shard: LoadedShard) -> None:
        super().__init__(shard.source, shard.tensors, shard.packings)
        scale, zero = shard.scale(), shard.zero()
        self._scale = None if scale is None else torch.ones(1, 1, dtype=scale.dtype)
        self._zero_dtype = None if zero is None else zero.dtype
        self._orders: dict[int, torch.Tensor] = {}
        self.order = 0
        self.middle = False

    def scale(self) -> torch.Tensor | None:
        return self._scale

    def zero(self) -> torch.Tensor | None:
        spec = self.source.scheme.weight.zero
        if self._zero_dtype is None or spec is None:
            return None
        middle = 1 << (self.source.scheme.weight.element.bits - 1)
        value = middle if self.middle else middle - 1
        # With scales of 1 a stored minimum is the negated zero point.
        sign = -1 if spec.kind == "minimum" and spec.negated else 1
        return torch.full((1, 1), sign * value, dtype=self._zero_dtype)

    def _numbers(self, role: Role, length: int) -> torch.Tensor | None:
        # Shards that differ here become parts only once they are loaded.
        return None if self.stored(role) is None else torch.ones(length)

    def input_zero(self) -> torch.Tensor | None:
        stored = self.stored(Role.INPUT_ZERO)
        return None if stored is None else torch.zeros(1, dtype=torch.int32)

    def group_index(self) -> torch.Tensor:
        if self.stored(Role.GROUP_INDEX) is None:
            return super().group_index()
        if self.order not in self._orders:
            source = self.source
            index = torch.arange(source.full_k) // source.scheme.weight.group_size(source.full_k)
            if self.order:
                generator = torch.Generator().manual_seed(self.order)
                index = index[torch.randperm(source.full_k, generator=generator)]
            self._orders[self.order] = index[source.k_start : source.k_start + source.k]
        return self._orders[self.order]
