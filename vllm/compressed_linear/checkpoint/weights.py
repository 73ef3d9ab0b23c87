# SPDX-License-Identifier: Apache-2.0
"""Weights of a layer in standard layout, from which a backend prepares its own.

``LoadedShard`` has this rank's part of one logical weight as stored. ``CompressedWeights`` yields
one or more of them, concatenated along N, in standard layout, a chunk of rows at a time, so that
preparation needs little memory beyond its result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from vllm.compressed_linear.checkpoint.facts import ShardNumbers
from vllm.compressed_linear.checkpoint.shard import CHUNK_BYTES, LoadedShard
from vllm.compressed_linear.spec.activation import prepare_input
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import ElementType
from vllm.compressed_linear.spec.scheme import (
    StandardWeights,
)


class CompressedWeights:
    """Argument of ``prep_weights_for_execution``: the weights of one part.

    ``n``, ``k``: shape in standard layout (``k`` after the channel order). ``permutation``: int32
    [k], x̂ = x[:, permutation] with −1 for a zero, or None. ``rows`` yields chunks of rows.

    ``row_scale``: fp32 [n], the second-level scale, or None. For the input, in this order, if the
    descriptor has them: ``prescale`` fp32 [k], ``input_scale`` fp32 [1], ``input_zero`` int32 [1].
    For y ``output_scale`` fp32 [1] and ``output_zero`` int32 [1].
    """

    def __init__(
        self, shards: Sequence[LoadedShard], numbers: Sequence[ShardNumbers], *, zero_points: bool
    ) -> None:
        """``numbers`` of each shard, all with the same channel gather. ``zero_points``: whether
        there are any except the element's own."""
        self.shards = tuple(shards)
        self._numbers = dict(enumerate(numbers))
        self._gather = gather = numbers[0].gather
        self._zero_points = zero_points
        self.n = sum(s.source.n + s.source.padding for s in shards)
        self.k = shards[0].source.k if gather is None else gather.k
        self.device = shards[0].device
        self.permutation = (
            None if gather is None or gather.order is None else gather.order.to(self.device)
        )
        self.row_scale = _row_scale(shards)
        self.prescale = self._ordered(shards[0].prescale())
        self.input_scale = shards[0].input_scale()
        self.input_zero = shards[0].input_zero()
        self.output_scale = shards[0].output_scale()
        self.output_zero = shards[0].output_zero()
        self._scales: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def _ordered(self, prescale: torch.Tensor | None) -> torch.Tensor | None:
        if prescale is None or self.permutation is None:
            return prescale
        order = self.permutation.to(torch.int64)
        return prescale.index_select(0, order.clamp(min=0)).masked_fill(order < 0, 1)

    def chunks(self, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Row ranges [start, stop) of at most ``CHUNK_BYTES`` of codes, whose starts are multiples
        of ``multiple``."""
        step = max(CHUNK_BYTES // max(self.k, 1) // multiple, 1) * multiple
        for start in range(0, self.n, step):
            yield start, min(start + step, self.n)

    def prepare_input(
        self, descriptor: CompressedLinearDescriptor, x: torch.Tensor
    ) -> torch.Tensor:
        """x̂, fp32 [M, k], for x [M, K of x], in the channel order of ``rows``."""
        transform = descriptor.transform
        return prepare_input(
            x,
            descriptor.activation,
            hadamard_block=0 if transform is None else transform.block,
            order=self.permutation,
            prescale=self.prescale,
            input_scale=self.input_scale,
            input_zero=self.input_zero,
        )

    def prepare_unquantized(
        self, descriptor: CompressedLinearDescriptor, x: torch.Tensor
    ) -> torch.Tensor:
        """``prepare_input`` without quantization."""
        return self.prepare_input(replace(descriptor, activation=None), x)

    def in_stored_order(self, channels: torch.Tensor) -> torch.Tensor:
        """[M, k] → [M, K of x]: undo the gather of channels."""
        if self.permutation is None:
            return channels
        order = self.permutation.to(torch.int64)
        out = channels.new_zeros(channels.shape[0], self.shards[0].source.k)
        out[:, order[order >= 0]] = channels[:, order >= 0]
        return out

    def rows(self, start: int, stop: int) -> StandardWeights:
        """Rows [start, stop) in standard layout: codes [n, k], scale [n, G], zero [n, G]."""
        parts = [self._shard_rows(*run) for run in self._runs(start, stop)]
        if not parts:
            return self._shard_rows(0, 0, 0)
        if len(parts) == 1:
            return parts[0]
        return StandardWeights(
            torch.cat([p.codes for p in parts]),
            _cat([p.scale for p in parts]),
            _cat([p.zero for p in parts]),
        )

    def scales(self, start: int, stop: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scale and zero [n, G] of rows [start, stop), as in ``rows``, without codes."""
        parts = [self._shard_row_scales(*run) for run in self._runs(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return _cat([scale for scale, _ in parts]), _cat([zero for _, zero in parts])

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, begin, end) for each shard that has some of the rows [start, stop)."""
        offset = 0
        for index, shard in enumerate(self.shards):
            total = shard.source.n + shard.source.padding
            begin, end = max(start - offset, 0), min(stop - offset, total)
            if begin < end:
                yield index, begin, end
            offset += total

    def _shard_rows(self, index: int, start: int, stop: int) -> StandardWeights:
        shard = self.shards[index]
        real = min(stop, shard.source.n)
        codes = shard.codes(start, real) if start < real else shard.codes(0, 0)
        if self._gather is not None and self._gather.order is not None:
            order = self._gather.order.to(codes.device, torch.int64)
            codes = codes.index_select(1, order.clamp(min=0))
            if self._gather.padded:
                codes = codes.masked_fill(order < 0, 0)
        pad = (stop - start) - codes.shape[0]
        return StandardWeights(
            _pad_rows(codes, pad, self.blank_code(index)),
            *self._shard_row_scales(index, start, stop),
        )

    def blank_code(self, index: int) -> int:
        """Code of the padding rows of a shard, whose scales are 0."""
        scale, zero = self._shard_scales(index)
        # With a scale of 0 any code means 0, but E8M0 has no 0.
        powers = scale is not None and scale.dtype == torch.uint8
        element = self.shards[index].source.scheme.weight.element
        return _zero_code(element) if powers and zero is None else 0

    def _shard_row_scales(
        self, index: int, start: int, stop: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        real = min(stop, self.shards[index].source.n)
        rows = slice(min(start, real), real)
        pad = (stop - start) - (rows.stop - rows.start)
        scale, zero = (
            None if values is None else _pad_rows(values[rows], pad)
            for values in self._shard_scales(index)
        )
        return scale, zero

    def _shard_scales(self, index: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if index not in self._scales:
            numbers = self._numbers.pop(index)
            scale, zero = numbers.scale, numbers.zero if self._zero_points else None
            if self._gather is not None:
                group_of = self._gather.group_of.to(self.device)
                scale, zero = _columns(scale, group_of), _columns(zero, group_of)
            self._scales[index] = scale, zero
        return self._scales[index]

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        """Decode rows [start, stop) to fp32 [stop − start, K of x], see ``dequantize_runs``."""
        return self.dequantize_runs([(start, stop)])

    def dequantize_runs(self, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Decode the rows of all ``runs`` [start, stop) to fp32 [rows, K of x], for self-checks.

        ``runs`` are ascending and do not overlap.
        """
        parts = []
        offset = 0
        for shard in self.shards:
            real, total = shard.source.n, shard.source.n + shard.source.padding
            inside = [(max(a - offset, 0), min(b - offset, total)) for a, b in runs]
            if own := [(a, min(b, real)) for a, b in inside if a < min(b, real)]:
                parts.append(shard.dequantize_runs(own))
            blank = sum(max(b - max(a, real), 0) for a, b in inside)
            parts.append(torch.zeros(blank, shard.source.k, device=shard.device))
            offset += total
        return torch.cat(parts)


def _columns(values: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """``values[:, index]``, without a copy if ``index`` is the identity."""
    if values is None or torch.equal(index, torch.arange(values.shape[1], device=index.device)):
        return values
    return values.index_select(1, index)


def _pad_rows(tensor: torch.Tensor, rows: int, value: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows), value=value) if rows else tensor


def _zero_code(element: ElementType) -> int:
    """The code that means 0; 0 if there is none."""
    if element.kind == "dense":
        return 0
    zeros = (element.table() == 0).nonzero()
    return int(zeros[0]) if len(zeros) else 0


def _row_scale(shards: Sequence[LoadedShard]) -> torch.Tensor | None:
    scales = []
    for shard in shards:
        scale = shard.row_scale()
        if scale is None:
            return None
        # Any code will do: padding rows have a scale of 0.
        scales.append(torch.nn.functional.pad(scale, (0, shard.source.padding), value=1))
    return torch.cat(scales)


def _cat(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present) if present else None


def to_standard_layout(
    descriptor: CompressedLinearDescriptor, weights: CompressedWeights
) -> StandardWeights:
    """The whole weight in standard layout, for backends without a packed layout.

    Takes 1 byte per weight (more for dense types); prefer chunks of rows (``weights.rows``).
    """
    if weights.n != descriptor.n or weights.k != descriptor.k:
        raise ValueError(
            f"weights are {weights.n}x{weights.k}, descriptor says {descriptor.n}x{descriptor.k}"
        )
    parts = [weights.rows(start, stop) for start, stop in weights.chunks()]
    if not parts:
        return (
            weights.rows(0, 0) if weights.shards else StandardWeights(torch.empty(0, 0), None, None)
        )
    return StandardWeights(
        torch.cat([p.codes for p in parts]),
        _cat([p.scale for p in parts]),
        _cat([p.zero for p in parts]),
    )
