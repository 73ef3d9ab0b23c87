# SPDX-License-Identifier: Apache-2.0
"""Validation of the numbers of a loaded shard: scales, zero points, numbers of the activation."""

from __future__ import annotations

import torch

from vllm.compressed_linear.checkpoint.shard import CHUNK_BYTES, CheckpointError, LoadedShard
from vllm.compressed_linear.spec.elements import widen_scale
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import Role, StoredTensor


def check_values(
    shard: LoadedShard,
    scale: torch.Tensor | None,
    stored_zero: torch.Tensor | None,
    zero: torch.Tensor | None,
) -> None:
    """Raise ``CheckpointError`` unless scales are finite, and 0 only over codes that mean 0.

    ``scale``, ``stored_zero``: [n, groups kept], as ``shard`` has them; ``zero``: zero points in
    units of codes.
    """
    _check_numbers(shard)
    codes = shard.stored(Role.CODES)
    if codes is not None and (packing := shard.packing(codes)) is not None and packing.single:
        _check_range(shard, codes, packing)
    stored = shard.stored(Role.SCALE)
    if scale is None or stored is None:
        return
    name = f"{shard.source.name}.{stored.name}"
    # E4M3 scales may underflow, which is the quantizer's choice.
    underflows = scale.dtype == torch.float8_e4m3fn
    scale = widen_scale(scale)
    _check_finite(shard, name, "scales", scale)
    points = shard.stored(Role.ZERO)
    if points is not None and (packing := shard.packing(points)) is None:
        _check_finite(shard, f"{shard.source.name}.{points.name}", "zero points", stored_zero)
    elif points is not None and packing is not None and packing.single:
        _check_range(shard, points, packing)
    if not underflows and bool((scale == 0).any()):
        _check_dead_groups(shard, name, scale, zero)


def _check_numbers(shard: LoadedShard) -> None:
    """Validate scalars and per-channel numbers: present, finite, input scales not 0."""
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
            centre = activation.symmetric
            bad |= numbers.abs() > (0 if centre else 1 << (activation.element.bits - 1))
        if bool(bad.any()):
            expected = {
                Role.INPUT_SCALE: "a finite number other than 0",
                Role.INPUT_ZERO: f"a zero point of x as {activation}",
            }.get(role, "finite numbers")
            raise CheckpointError(
                f"{name}: {int(bad.sum())} of {numbers.numel()} values cannot be used, the first "
                f"is {float(numbers[bad][0])}; expected {expected}"
            )


def _check_dead_groups(
    shard: LoadedShard, name: str, scale: torch.Tensor, zero: torch.Tensor | None
) -> None:
    """Accept a scale of 0 over codes that all mean 0 (a dead group); over others it is an error."""
    index = shard.group_index().to(scale.device)
    element = shard.source.scheme.weight.element
    # Values, zero points and scales are expanded to all channels, as fp32.
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


def _check_range(shard: LoadedShard, stored: StoredTensor, packing: Packing) -> None:
    """Validate that values that are not packed have the bits that they are stated to have."""
    values = shard.tensors[stored.name]
    if not values.numel() or values.is_meta:
        return
    first = -(1 << (packing.bits - 1)) if packing.signed else 0
    last = first + (1 << packing.bits) - 1
    low, high = (int(value) for value in values.aminmax())
    if low < first or high > last:
        raise CheckpointError(
            f"{shard.source.name}.{stored.name}: values run from {low} to {high}, expected {first} "
            f"to {last} ({packing.bits} bits)"
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
