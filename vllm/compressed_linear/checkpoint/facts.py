# SPDX-License-Identifier: Apache-2.0
"""From loaded shards to descriptors: facts that only the data tells, used without loss.

A trivial ``g_idx`` vanishes, zero points that all equal the middle code become a symmetric element
type, the dtype scales really have is stated, and neighbouring shards that agree become one
descriptor. What remains unlike becomes several parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vllm.compressed_linear.checkpoint.channels import ChannelPlan
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard
from vllm.compressed_linear.checkpoint.weights import CHUNK_BYTES, CompressedWeights, channel_plan
from vllm.compressed_linear.spec.descriptor import (
    ChannelOrder,
    CompressedLinearDescriptor,
    ScaleSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import dtype_name, scale_dtype_name, uint, widen_scale
from vllm.compressed_linear.spec.scheme import Role


@dataclass(frozen=True)
class LayerContext:
    """What a layer is apart from its weights: dtypes, and whether it is an embedding table, whose
    rows are looked up."""

    input_dtype: str
    output_dtype: str
    bias_dtype: str | None = None
    lookup: bool = False


@dataclass(frozen=True)
class Part:
    """A run of shards that one backend computes: output columns [start, start + descriptor.n)."""

    start: int
    descriptor: CompressedLinearDescriptor
    weights: CompressedWeights


def refine(shards: Sequence[LoadedShard], context: LayerContext) -> list[Part]:
    """Validate ``shards`` and describe them. Raises ``CheckpointError`` on damaged data."""
    plans: list[ChannelPlan | None] = []
    specs: list[WeightSpec] = []
    for shard in shards:
        plan = channel_plan(shard)
        _check_values(shard)
        plans.append(plan)
        specs.append(_refined_spec(shard, plan))
    parts: list[Part] = []
    begin = offset = 0
    for end in range(1, len(shards) + 1):
        if (
            end < len(shards)
            and _alike(specs, plans, begin, end)
            and _same_input(shards[begin], shards[end])
        ):
            continue
        weights = CompressedWeights(
            shards[begin:end], plans[begin], zero_points=specs[begin].zero is not None
        )
        plan = plans[begin]
        descriptor = CompressedLinearDescriptor(
            in_features=shards[begin].source.k,
            out_features=weights.n,
            weight=_with_blocks(specs[begin], shards[begin:end], plans[begin]),
            input_dtype=context.input_dtype,
            output_dtype=context.output_dtype,
            bias_dtype=context.bias_dtype,
            channel_order=(
                None if plan is None or plan.order is None else ChannelOrder(plan.k, plan.padded)
            ),
            activation=shards[begin].source.scheme.activation,
            prescale=None if weights.prescale is None else "float32",
            transform=shards[begin].source.scheme.transform,
            lookup=context.lookup,
        )
        parts.append(Part(offset, descriptor, weights))
        offset += weights.n
        begin = end
    return parts


def _with_blocks(
    spec: WeightSpec, shards: Sequence[LoadedShard], plan: ChannelPlan | None
) -> WeightSpec:
    """``spec`` of a part of ``shards``, with the blocks of rows that share scales, if they do."""
    rows = _block_rows(shards)
    if rows == 1 or plan is None or spec.scale is None or spec.zero is not None:
        return spec
    return replace(spec, scale=ScaleSpec(spec.scale.dtype, "block", plan.group_size, rows))


def _block_rows(shards: Sequence[LoadedShard]) -> int:
    """How many rows share scales, counted from the first row of all ``shards`` together; 1 where
    one of them begins in the middle of a block, or its slice cuts one, or padding fills one up.

    Only whole members may end with a short block: a slice that does begins with one on another
    rank, and what is said should not depend on the rank.
    """
    rows = shards[0].source.block_rows
    offset = 0
    for shard in shards:
        source = shard.source
        begins = offset % rows == 0 and source.n_start % rows == 0
        whole = source.n == source.full_n and not source.padding
        if source.block_rows != rows or not begins or not (whole or source.n % rows == 0):
            return 1
        offset += source.n + source.padding
    return rows


def _alike(
    specs: Sequence[WeightSpec], plans: Sequence[ChannelPlan | None], a: int, b: int
) -> bool:
    if specs[a] != specs[b]:
        return False
    one, two = plans[a], plans[b]
    if one is None or two is None:
        return one is two
    same_order = (one.order is None) == (two.order is None) and (
        one.order is None or two.order is None or torch.equal(one.order, two.order)
    )
    # CompressedWeights applies one plan to all its shards, so the group maps must agree too.
    return same_order and torch.equal(one.group_of, two.group_of)


def _same_input(one: LoadedShard, two: LoadedShard) -> bool:
    """Whether both want x treated alike, so that it is treated once for both."""
    schemes = one.source.scheme, two.source.scheme
    if (schemes[0].activation, schemes[0].transform) != (
        schemes[1].activation,
        schemes[1].transform,
    ):
        return False
    return all(
        _same(getattr(one, what)(), getattr(two, what)())
        for what in ("input_scale", "input_zero", "prescale")
    )


def _same(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return torch.equal(one, two)


def _refined_spec(shard: LoadedShard, plan: ChannelPlan | None) -> WeightSpec:
    second = None if shard.stored(Role.ROW_SCALE) is None else "float32"
    spec = replace(shard.source.scheme.weight, row_scale=second)
    scale = shard.scale()
    if scale is None or spec.scale is None:
        return spec
    granularity = spec.scale.granularity
    if plan is not None:
        granularity = "group" if len(plan.group_of) > 1 else "channel"
    scale_spec = ScaleSpec(
        scale_dtype_name(scale.dtype),
        granularity,
        plan.group_size if plan is not None and granularity == "group" else -1,
    )
    zero = shard.zero_in_codes()
    if spec.element.kind != "integer" or zero is None:
        return replace(spec, scale=scale_spec, zero=None if zero is None else spec.zero)
    middle = 1 << (spec.element.bits - 1)
    if zero.numel() and bool((zero == middle).all()):
        return replace(spec, element=uint(spec.element.bits, middle), scale=scale_spec, zero=None)
    kind = "float" if zero.is_floating_point() else "integer"
    return replace(spec, scale=scale_spec, zero=ZeroSpec(kind, dtype_name(zero.dtype)))


def _check_values(shard: LoadedShard) -> None:
    """Scales are finite, and a zero scale only where nothing is lost by it."""
    _check_numbers(shard)
    scale = shard.scale()
    stored = shard.stored(Role.SCALE)
    if scale is None or stored is None:
        return
    name = f"{shard.source.name}.{stored.name}"
    # e4m3 scales may round to 0: what that loses, the quantiser chose to lose.
    underflows = scale.dtype == torch.float8_e4m3fn
    scale = widen_scale(scale)
    _check_finite(shard, name, "scales", scale)
    points = shard.stored(Role.ZERO)
    if points is not None and shard.packing(points) is None:
        _check_finite(shard, f"{shard.source.name}.{points.name}", "zero points", shard.zero())
    if not underflows and bool((scale == 0).any()):
        _check_dead_groups(shard, name, scale)


def _check_numbers(shard: LoadedShard) -> None:
    """What the activation needs is there, and every number of few can be computed with."""
    activation = shard.source.scheme.activation
    for role, needed, numbers in (
        (Role.ROW_SCALE, False, shard.row_scale()),
        (Role.INPUT_SCALE, activation is not None and activation.needs_scale, shard.input_scale()),
        (Role.INPUT_ZERO, activation is not None and activation.needs_zero, shard.input_zero()),
        (Role.PRESCALE, False, shard.prescale()),
    ):
        stored = shard.stored(role)
        if numbers is None or stored is None:
            if needed:
                raise CheckpointError(
                    f"{shard.source.name}: x as {activation} needs a tensor of {role}, "
                    "which the checkpoint does not have"
                )
            continue
        name = f"{shard.source.name}.{stored.name}"
        bad = ~torch.isfinite(numbers)
        if role is Role.INPUT_SCALE:
            bad |= numbers == 0
        elif role is Role.INPUT_ZERO and activation is not None:
            bad |= numbers.abs() > 1 << (activation.element.bits - 1)
        if bool(bad.any()):
            expected = "a finite number other than 0" if role is Role.INPUT_SCALE else "others"
            raise CheckpointError(
                f"{name}: {int(bad.sum())} of {numbers.numel()} values cannot be used, the first "
                f"is {float(numbers[bad][0])}; expected {expected}"
            )


def _check_dead_groups(shard: LoadedShard, name: str, scale: torch.Tensor) -> None:
    """A zero scale over codes that all mean zero is a dead group; over others it lost weights."""
    index, zero = shard.group_index().to(scale.device), shard.zero_in_codes()
    element = shard.source.scheme.weight.element
    # Values, zero points and scales are spread over all channels, as fp32.
    step = max(CHUNK_BYTES // (16 * shard.source.k), 1)
    for start in range(0, shard.source.n, step):
        rows = slice(start, min(start + step, shard.source.n))
        dead = scale[rows] == 0
        if not bool(dead.any()):
            continue
        values = element.decode(shard.codes(rows.start, rows.stop))
        if zero is not None:
            values = values - zero[rows].to(torch.float32)[:, index]
        lost = (values != 0) & dead[:, index]
        if bool(lost.any()):
            row, channel = (int(i) for i in lost.nonzero()[0])
            raise CheckpointError(
                f"{name}: scale 0 at output channel {shard.source.n_start + start + row}, group "
                f"{int(index[channel])}, although its codes are not all zero; expected a scale "
                "other than 0"
            )


def _check_finite(shard: LoadedShard, name: str, what: str, values: torch.Tensor | None) -> None:
    if values is None:
        return
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        row, group = (int(i) for i in bad.nonzero()[0])
        raise CheckpointError(
            f"{name}: {int(bad.sum())} of {values.numel()} {what} are not finite, the first is "
            f"{float(values[row, group])} at output channel {shard.source.n_start + row}, "
            f"group {group}; expected finite numbers"
        )
