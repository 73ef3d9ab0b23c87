# SPDX-License-Identifier: Apache-2.0
"""Validation of the numbers of a loaded shard: scales, zero points, numbers of the activation."""

from __future__ import annotations

import torch

from vllm.compressed_linear.checkpoint.shard import CHUNK_BYTES, CheckpointError, LoadedShard
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import E4M3, widen_scale
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
    _check_codes(shard)
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
    row_scale, second = shard.row_scale(), shard.stored(Role.ROW_SCALE)
    _check_magnitude(shard, name, scale, row_scale)
    if row_scale is not None and second is not None and bool((row_scale == 0).any()):
        spread = row_scale.unsqueeze(1).expand_as(scale)
        _check_dead_groups(shard, f"{shard.source.name}.{second.name}", spread, zero)
    # A weight that underflows as a whole was not quantized so.
    if bool((scale == 0).all() if underflows else (scale == 0).any()):
        _check_dead_groups(shard, name, scale, zero)


def _check_codes(shard: LoadedShard) -> None:
    """Validate that 8-bit floats are finite, unless codes are not read (``explain``)."""
    element, stored = shard.source.scheme.weight.element, shard.stored(Role.CODES)
    if element.kind != "float" or element.bits != 8 or stored is None:
        return
    if shard.tensors[stored.name].is_meta:
        return
    # Codes without their sign, of which the last ones are infinite or no numbers.
    first = int((~torch.isfinite(element.table()[:128])).nonzero()[0])
    step = max(CHUNK_BYTES // max(shard.source.k, 1), 1)
    for start in range(0, shard.source.n, step):
        codes = shard.codes(start, min(start + step, shard.source.n))
        bad = (codes & 127) >= first
        if bool(bad.any()):
            row, channel = (int(i) for i in bad.nonzero()[0])
            raise CheckpointError(
                f"{shard.source.name}.{stored.name}: a weight is "
                f"{float(element.decode(codes[row, channel]))} at output channel "
                f"{shard.source.n_start + start + row}, input channel "
                f"{shard.source.k_start + channel}; expected finite numbers"
            )


def _check_numbers(shard: LoadedShard) -> None:
    """Validate scalars and per-channel numbers: present, finite, static scales not 0."""
    scheme = shard.source.scheme
    _check_finite_numbers(shard, Role.ROW_SCALE, shard.row_scale())
    prescale = shard.prescale()
    lost = None if prescale is None else prescale == 0
    _check_finite_numbers(shard, Role.PRESCALE, prescale, lost, "finite numbers other than 0")
    scales = {
        Role.INPUT_SCALE: (scheme.activation, shard.input_scale()),
        Role.OUTPUT_SCALE: (scheme.output_activation, shard.output_scale()),
    }
    for role, (spec, scale) in scales.items():
        _check_needed(shard, role, spec, scale, needed=spec is not None and spec.needs_scale)
        expected = "a finite number" + ("" if scheme.zero_is_off else " other than 0")
        bad = None
        if scale is not None:
            limit = torch.finfo(torch.float32).max / _largest_quotient(spec)
            bad = (scale.abs() > limit) | ((scale == 0) & (not scheme.zero_is_off))
            expected += f" below {limit:.3g}"
        _check_finite_numbers(shard, role, scale, bad, expected)
    zeros = {
        Role.INPUT_ZERO: (scheme.activation, shard.input_zero()),
        Role.OUTPUT_ZERO: (scheme.output_activation, shard.output_zero()),
    }
    for role, (spec, zero) in zeros.items():
        _check_needed(shard, role, spec, zero, needed=spec is not None and spec.needs_zero)
        if spec is not None and zero is not None:
            centred = spec.symmetric and not spec.dynamic
            largest = 0 if centred else 1 << (spec.element.bits - 1)
            of = "x" if role is Role.INPUT_ZERO else "y"
            bad = zero.abs() > largest
            _check_finite_numbers(shard, role, zero, bad, f"a zero point of {of} as {spec}")


def _largest_quotient(spec: ActivationSpec | None) -> float:
    """The largest |x̂| in units of a static scale."""
    if spec is None:
        return 1.0
    if spec.element.kind == "integer":
        return float(1 << spec.element.bits)
    return spec.element.largest * (E4M3.largest if spec.scale_dtype == "float8_e4m3fn" else 1.0)


def _check_needed(
    shard: LoadedShard,
    role: Role,
    spec: ActivationSpec | None,
    numbers: torch.Tensor | None,
    *,
    needed: bool,
) -> None:
    if needed and numbers is None:
        of = "x" if role in (Role.INPUT_SCALE, Role.INPUT_ZERO) else "y"
        raise CheckpointError(
            f"{shard.source.name}: {of} as {spec} needs a tensor of {role}, which the checkpoint "
            "does not have"
        )


def _check_finite_numbers(
    shard: LoadedShard,
    role: Role,
    numbers: torch.Tensor | None,
    also_bad: torch.Tensor | None = None,
    expected: str = "finite numbers",
) -> None:
    stored = shard.stored(role)
    if numbers is None or stored is None:
        return
    bad = ~torch.isfinite(numbers)
    if also_bad is not None:
        bad |= also_bad
    if bool(bad.any()):
        raise CheckpointError(
            f"{shard.source.name}.{stored.name}: {int(bad.sum())} of {numbers.numel()} values "
            f"cannot be used, the first is {float(numbers[bad][0])}; expected {expected}"
        )


def _check_magnitude(
    shard: LoadedShard, name: str, scale: torch.Tensor, row_scale: torch.Tensor | None
) -> None:
    """Validate that weights are finite in fp32, in which they are defined."""
    element = shard.source.scheme.weight.element
    if not scale.numel() or scale.is_meta:
        return
    largest = float(1 << element.bits) if element.kind == "integer" else element.largest
    reach = float(scale.abs().max()) * largest
    second = 1.0 if row_scale is None else max(float(row_scale.abs().max()), 1.0)
    if reach * second > torch.finfo(torch.float32).max:
        stored = shard.stored(Role.ROW_SCALE)
        times = "" if stored is None else f" and {shard.source.name}.{stored.name} {second:.6g}"
        raise CheckpointError(
            f"{name}: scales reach {float(scale.abs().max()):.6g}{times}, with which weights of "
            f"{element.name} exceed fp32; expected weights below "
            f"{torch.finfo(torch.float32).max:.3g}"
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
