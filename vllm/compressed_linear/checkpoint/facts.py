# SPDX-License-Identifier: Apache-2.0
"""Facts of the values of a shard, from which descriptors are decided without tensors.

``read_facts`` touches the tensors of a shard once and validates them; ``describe`` decides from
facts alone, so ``explain`` can decide from assumed facts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from vllm.compressed_linear.checkpoint.channels import ChannelGather, gather_channels
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard
from vllm.compressed_linear.checkpoint.validation import check_values
from vllm.compressed_linear.spec.descriptor import ZeroSpec
from vllm.compressed_linear.spec.elements import dtype_name, scale_dtype_name
from vllm.compressed_linear.spec.scheme import Role


@dataclass(frozen=True)
class GroupOrder:
    """Assignment of a shard's channels to groups. ``identity``: equal for equal assignments.

    ``k``: channels after the gather, padding included, in groups of ``group_size`` each.
    """

    identity: str
    k: int
    group_size: int
    reordered: bool
    padded: bool

    @classmethod
    def of(cls, gather: ChannelGather) -> GroupOrder:
        """The order of a channel gather."""
        identity = f"{_digest(gather.group_of)} {_digest(gather.order)}"
        return cls(identity, gather.k, gather.group_size, gather.order is not None, gather.padded)

    @property
    def groups(self) -> int:
        return self.k // self.group_size


@dataclass(frozen=True)
class ShardFacts:
    """Everything that ``describe`` needs to know about the tensors of one shard.

    ``channels``: None without scales or channels. ``scale_dtype``: as ``ScaleSpec`` names it, None
    without scales. ``zero``: zero points as they are stored, None without any;
    ``zeros_are_middle``: all of them are 2^(bits − 1). ``input_numbers``: identities of the static
    scale, the static zero point and the prescale of x, "" for none; ``output_numbers``:
    likewise of y. ``off``: whether x, and y, are not quantized since their static scale is 0
    (``CheckpointScheme.zero_is_off``). ``note``: for the plan.
    """

    channels: GroupOrder | None
    scale_dtype: str | None
    zero: ZeroSpec | None
    zeros_are_middle: bool = False
    row_scale: bool = False
    input_numbers: tuple[str, str, str] = ("", "", "")
    output_numbers: tuple[str, str] = ("", "")
    off: tuple[bool, bool] = (False, False)
    note: str = ""

    @property
    def prescaled(self) -> bool:
        return bool(self.input_numbers[2])


@dataclass(frozen=True)
class ShardNumbers:
    """Tensors that were unpacked for the facts and are needed again for preparation.

    ``scale``: [n, groups kept] in the checkpoint's dtype (uint8 for E8M0). ``zero``: [n, groups
    kept] in units of codes. ``gather``: the gather of channels.
    """

    scale: torch.Tensor | None
    zero: torch.Tensor | None
    gather: ChannelGather | None


def read_facts(shard: LoadedShard) -> tuple[ShardFacts, ShardNumbers]:
    """The facts of a loaded shard. Raises ``CheckpointError`` on damaged data."""
    note = "; ".join(filter(None, (_zero_note(shard), shard.source.scheme.note)))
    gather = channel_gather(shard)
    scale, stored_zero = shard.scale(), shard.zero()
    zero = shard.in_codes(stored_zero, scale)
    check_values(shard, scale, stored_zero, zero)
    element = shard.source.scheme.weight.element
    middle = (
        element.kind == "integer"
        and zero is not None
        and bool(zero.numel())
        and bool((zero == 1 << (element.bits - 1)).all())
    )
    facts = ShardFacts(
        None if gather is None else GroupOrder.of(gather),
        None if scale is None else scale_dtype_name(scale.dtype),
        _zero_spec(shard, zero),
        middle,
        shard.stored(Role.ROW_SCALE) is not None,
        (
            _digest(shard.input_scale()),
            _digest(shard.input_zero()),
            _digest(shard.prescale()),
        ),
        (_digest(shard.output_scale()), _digest(shard.output_zero())),
        (_is_off(shard, shard.input_scale()), _is_off(shard, shard.output_scale())),
        note,
    )
    return facts, ShardNumbers(scale, zero, gather)


def stated_facts(shard: LoadedShard, channels: GroupOrder | None, middle: bool) -> ShardFacts:
    """Facts of a shard of meta tensors, by its dtypes and shapes; all others are arguments.

    Static numbers of x are assumed to be equal in all shards: members of a fused layer that differ
    in them become separate parts once they are loaded.
    """
    scale, zero = shard.scale(), shard.zero()
    roles = (Role.INPUT_SCALE, Role.INPUT_ZERO, Role.PRESCALE)
    outputs = (Role.OUTPUT_SCALE, Role.OUTPUT_ZERO)
    reading = shard.zero_reading
    middle = middle or (reading is not None and reading.middle)
    return ShardFacts(
        channels,
        None if scale is None else scale_dtype_name(scale.dtype),
        _zero_spec(shard, shard.in_codes(zero, scale)),
        middle and zero is not None,
        shard.stored(Role.ROW_SCALE) is not None,
        tuple("stated" if shard.stored(role) else "" for role in roles),  # type: ignore[arg-type]
        tuple("stated" if shard.stored(role) else "" for role in outputs),  # type: ignore[arg-type]
        note=shard.source.scheme.note,
    )


def channel_gather(shard: LoadedShard) -> ChannelGather | None:
    """The channel gather of one shard, None for weights without scales or channels.

    Raises ``CheckpointError`` for a group index that is out of range.
    """
    if shard.source.scheme.weight.scale is None or shard.source.k == 0:
        return None
    return gather_channels(shard.group_index())


def _zero_note(shard: LoadedShard) -> str:
    """Note on zero points of a weight that the configuration calls symmetric. Raises
    ``CheckpointError`` if they cannot be."""
    reading, stored = shard.zero_reading, shard.stored(Role.ZERO)
    if reading is None or stored is None:
        return ""
    if reading.error:
        raise CheckpointError(f"{shard.source.name}.{stored.name}: {reading.error}")
    return reading.note


def _zero_spec(shard: LoadedShard, zero: torch.Tensor | None) -> ZeroSpec | None:
    spec = shard.source.scheme.weight
    if zero is None or spec.element.kind != "integer" or spec.scale is None:
        return None if zero is None else spec.zero
    return ZeroSpec("float" if zero.is_floating_point() else "integer", dtype_name(zero.dtype))


def _is_off(shard: LoadedShard, scale: torch.Tensor | None) -> bool:
    return shard.source.scheme.zero_is_off and scale is not None and not bool(scale.any())


def _digest(tensor: torch.Tensor | None) -> str:
    """Equal for equal tensors; "" for None."""
    if tensor is None:
        return ""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()
