# SPDX-License-Identifier: Apache-2.0
"""The weights of a layer between the checkpoint and a backend.

``LoadedShard`` holds this rank's part of one logical weight exactly as the checkpoint has it.
``CompressedWeights`` presents one or more of them, concatenated along N, in standard layout, a
chunk of rows at a time, so that preparation needs little memory beyond its result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from vllm.compressed_linear.activation import prepare_input
from vllm.compressed_linear.channels import ChannelPlan, plan_channels
from vllm.compressed_linear.descriptor import (
    CheckpointScheme,
    CompressedLinearDescriptor,
    WeightSpec,
)
from vllm.compressed_linear.interleave import uninterleave
from vllm.compressed_linear.layout import (
    AxisSlice,
    Packing,
    Role,
    StandardWeights,
    StoredTensor,
    pack,
    slice_axis,
    unpack,
)
from vllm.compressed_linear.numerics import ElementType, torch_dtype, widen_scale

CHUNK_BYTES = 4 << 20
"""Standard-layout bytes that one chunk of rows may take."""


class CheckpointError(ValueError):
    """The checkpoint's data is damaged or contradicts its configuration."""


@dataclass(frozen=True)
class ShardSource:
    """Where this rank's part of one logical weight lies in the checkpoint.

    ``name``: the layer's name in the checkpoint, for messages. ``full_n``, ``full_k``: shape of the
    whole weight on disk. This rank holds rows [n_start, n_start + n) and channels
    [k_start, k_start + k), and after its rows ``padding`` rows of zeros (padded vocabularies).
    """

    name: str
    scheme: CheckpointScheme
    full_n: int
    full_k: int
    n_start: int
    n: int
    k_start: int
    k: int
    padding: int = 0

    @property
    def extents(self) -> dict[str, int]:
        """Length of each logical axis on disk."""
        return {
            "N": self.full_n,
            "K": self.full_k,
            "G": self.scheme.weight.groups(self.full_k),
            "B": -(-self.full_n // self.block_rows),
        }

    @property
    def block_rows(self) -> int:
        """Output channels that share scales."""
        scale = self.scheme.weight.scale
        return 1 if scale is None else scale.block_rows

    @property
    def has_group_index(self) -> bool:
        return any(t.role is Role.GROUP_INDEX for t in self.scheme.tensors)

    def span(self, axis: str) -> tuple[int, int]:
        """(start, length) of this rank's part of a logical axis.

        Scales stay whole along G where a group index may point anywhere; otherwise every group
        that this rank's channels touch is kept, also one that a shard border cuts. So are blocks
        of rows.
        """
        if axis == "N":
            return self.n_start, self.n
        if axis == "K":
            return self.k_start, self.k
        if axis == "B":
            first = self.n_start // self.block_rows
            return first, -(-(self.n_start + self.n) // self.block_rows) - first if self.n else 0
        if self.has_group_index or not self.k:
            return 0, self.extents["G"]
        size = self.scheme.weight.group_size(self.full_k)
        first = self.k_start // size
        return first, -(-(self.k_start + self.k) // size) - first

    def slices(self, stored: StoredTensor, packing: Packing | None) -> list[AxisSlice | None]:
        """The part of each stored dimension that this rank keeps (None: all of a fixed length).

        A matrix-wide interleave has no contiguous parts, so such tensors are kept whole.
        """
        whole = bool(stored.interleave)
        out: list[AxisSlice | None] = []
        for axis in stored.axes:
            if isinstance(axis, int):
                out.append(None)
                continue
            start, length = (0, self.extents[axis]) if whole else self.span(axis)
            if packing is not None and packing.axis == axis and self.packing_is_open(stored):
                out.append(AxisSlice(0, packing.words(self.extents[axis]), start, length))
            else:
                out.append(slice_axis(packing, axis, start, length))
        return out

    def packing_is_open(self, stored: StoredTensor) -> bool:
        """Whether the tensor's shape fits several of its packings; it is kept whole then, since the
        other tensors tell when they are there. Only short axes are like that."""
        shapes = {stored.shape(self.extents, packing) for packing in stored.packings}
        return bool(stored.variants) and len(shapes) < len(stored.packings)

    def kept_shape(self, stored: StoredTensor, packing: Packing | None) -> tuple[int, ...]:
        """Shape of what this rank keeps of ``stored``."""
        if stored.interleave:
            return stored.shape(self.extents)
        return tuple(
            int(axis) if part is None else part.count
            for axis, part in zip(stored.axes, self.slices(stored, packing), strict=True)
        )


@dataclass(frozen=True)
class StoredCodes:
    """The codes of a shard as stored, for a backend that reads them without a detour.

    ``skips``: along each logical axis, how many elements come before this rank's first one.
    """

    stored: StoredTensor
    tensor: torch.Tensor
    packing: Packing | None
    skips: Mapping[str, int]


@dataclass
class LoadedShard:
    """This rank's part of one logical weight, as stored. ``packings``: which of a tensor's
    packings the file turned out to have."""

    source: ShardSource
    tensors: Mapping[str, torch.Tensor]
    packings: Mapping[str, Packing | None] = field(default_factory=dict)

    def stored(self, role: Role) -> StoredTensor | None:
        """The scheme's tensor of ``role`` if the checkpoint has it."""
        for tensor in self.source.scheme.tensors:
            if tensor.role is role and tensor.name in self.tensors:
                return tensor
        return None

    def packing(self, stored: StoredTensor) -> Packing | None:
        return self.packings.get(stored.name, stored.packing)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def _matrix(self, role: Role, second: str, start: int, stop: int) -> torch.Tensor | None:
        """Rows [start, stop) of a tensor with axes N and ``second``, unpacked, as [n, second]."""
        stored = self.stored(role)
        if stored is None:
            return None
        packing = self.packing(stored)
        tensor = self.tensors[stored.name]
        if stored.interleave:
            first, count = self.source.span(second)
            begin = self.source.n_start
            return uninterleave(tensor, stored, begin + start, begin + stop).narrow(1, first, count)
        axes = [axis for axis in stored.axes if isinstance(axis, str)]
        if not axes:
            return tensor.reshape(1, 1).expand(stop - start, self.source.span(second)[1])
        # Fixed lengths beside an axis are all 1: [N, 1], [N / 128, 1, K / 128, 1].
        tensor = tensor.reshape(
            [n for n, axis in zip(tensor.shape, stored.axes, strict=True) if axis in axes]
        )
        dims = {axis: dim for dim, axis in enumerate(axes)}
        if "B" in dims:
            first = self.source.n_start
            rows = torch.arange(first + start, first + stop, device=tensor.device)
            blocks = rows // self.source.block_rows - self.source.span("B")[0]
            tensor = tensor.index_select(dims["B"], blocks)
            if len(axes) == 1:
                return tensor.reshape(-1, 1)
            return tensor if dims["B"] == 0 else tensor.t()
        # Skips of the slice that was loaded, so that rows count from this rank's first one.
        loaded = dict(zip(stored.axes, self.source.slices(stored, packing), strict=True))
        n_part = loaded["N"]
        assert n_part is not None
        rows_part = slice_axis(packing, "N", n_part.skip + start, stop - start)
        tensor = tensor.narrow(dims["N"], rows_part.first, rows_part.count)
        if packing is not None:
            part = rows_part if packing.axis == "N" else loaded[second]
            assert part is not None
            dim = dims[packing.axis]
            tensor = unpack(tensor, packing, part.skip + part.length, dim)
            tensor = tensor.narrow(dim, part.skip, part.length)
        if len(axes) == 1:
            return tensor.reshape(-1, 1)
        return tensor if dims["N"] == 0 else tensor.t()

    def codes(self, start: int, stop: int) -> torch.Tensor:
        """Codes uint8 [stop − start, K] (or dense values) in the checkpoint's channel order."""
        codes = self._matrix(Role.CODES, "K", start, stop)
        assert codes is not None
        if self.source.scheme.weight.element.kind == "float" and codes.is_floating_point():
            return codes.view(torch.uint8)
        return codes

    def stored_codes(self) -> StoredCodes:
        """The codes as the checkpoint has them."""
        stored = self.stored(Role.CODES)
        assert stored is not None
        packing = self.packing(stored)
        skips = {
            str(axis): part.skip
            for axis, part in zip(stored.axes, self.source.slices(stored, packing), strict=True)
            if part is not None
        }
        return StoredCodes(stored, self.tensors[stored.name], packing, skips)

    def scale(self) -> torch.Tensor | None:
        """[n, groups kept] in the checkpoint's dtype (uint8 for e8m0), or None."""
        return self._scale_rows(0, self.source.n)

    def _scale_rows(self, start: int, stop: int) -> torch.Tensor | None:
        scale, stored = self._matrix(Role.SCALE, "G", start, stop), self.stored(Role.SCALE)
        if scale is None or stored is None:
            return None
        if scale.dtype == torch.float8_e8m0fnu:
            scale = scale.view(torch.uint8)
        return 1 / widen_scale(scale) if stored.reciprocal else scale

    def row_scale(self) -> torch.Tensor | None:
        """Second-level scale, fp32 [n], or None."""
        return self._numbers(Role.ROW_SCALE, self.source.n)

    def input_scale(self) -> torch.Tensor | None:
        """Static scale of x, fp32 [1], or None."""
        return self._numbers(Role.INPUT_SCALE, 1)

    def prescale(self) -> torch.Tensor | None:
        """What x is multiplied with, fp32 [K] in the checkpoint's channel order, or None."""
        return self._numbers(Role.PRESCALE, self.source.k)

    def input_zero(self) -> torch.Tensor | None:
        """Static zero point of x, int32 [1], 0 for the middle of the range; or None."""
        stored = self.stored(Role.INPUT_ZERO)
        return None if stored is None else self.tensors[stored.name].reshape(1).to(torch.int32)

    def _numbers(self, role: Role, length: int) -> torch.Tensor | None:
        """A tensor of one number or of one for each channel, as fp32 [length]."""
        stored = self.stored(role)
        if stored is None:
            return None
        numbers = widen_scale(self.tensors[stored.name]).flatten().expand(length)
        return 1 / numbers if stored.reciprocal else numbers

    def zero(self) -> torch.Tensor | None:
        """[n, groups kept], or None."""
        return self._matrix(Role.ZERO, "G", 0, self.source.n)

    def zero_in_codes(self) -> torch.Tensor | None:
        """Zero points in units of codes: as stored, or a stored minimum divided by the scale (fp32,
        one rounding). A scale of 0 has zero point 0."""
        zero, spec = self.zero(), self.source.scheme.weight.zero
        if zero is None or spec is None or spec.kind != "minimum":
            return zero
        scale = self.scale()
        assert scale is not None
        wide = widen_scale(scale)
        points = zero.to(torch.float32) / torch.where(wide == 0, 1, wide)
        return torch.where(wide == 0, 0, -points if spec.negated else points)

    def group_index(self) -> torch.Tensor:
        """int64 [K]: for each channel of this rank, the column of ``scale()`` it uses.

        Raises ``CheckpointError`` for an index out of range.
        """
        source = self.source
        groups = source.extents["G"]
        stored = self.stored(Role.GROUP_INDEX)
        if stored is not None:
            index = self.tensors[stored.name].to(torch.int64)
            if index.numel() and (int(index.min()) < 0 or int(index.max()) >= groups):
                raise CheckpointError(
                    f"{source.name}.{stored.name}: group index runs from {int(index.min())} to "
                    f"{int(index.max())}, expected 0 to {groups - 1} ({groups} groups)"
                )
            return index
        size = source.scheme.weight.group_size(source.full_k)
        index = torch.arange(source.k_start, source.k_start + source.k) // max(size, 1)
        return index - source.span("G")[0]

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        """fp32 [stop − start, K], the meaning of the stored tensors with nothing refined.

        This is what self-checks compare against, so it follows the checkpoint's own indices and
        shares no code with the channel plan.
        """
        weight = self.source.scheme.weight
        values = weight.element.decode(self.codes(start, stop))
        # Only these rows of them: self-checks ask row by row.
        scale = self._scale_rows(start, stop)
        zero = self._matrix(Role.ZERO, "G", start, stop)
        rows = self.row_scale()
        second = 1 if rows is None else rows[start:stop].unsqueeze(1)
        if scale is None:
            return values * second
        group = self.group_index().to(values.device)
        wide = widen_scale(scale)[:, group]
        spec = weight.zero
        if zero is None or spec is None:
            return values * wide * second
        subtract = zero.to(torch.float32)[:, group] * (-1 if spec.negated else 1)
        if spec.kind == "minimum":
            return (values * wide - subtract) * second
        return (values - subtract) * wide * second


class CompressedWeights:
    """What ``prep_weights_for_execution`` receives.

    ``n``, ``k``: shape in standard layout (``k`` after the channel order). ``permutation``: int32
    [k], x̂ = x[:, permutation] with −1 meaning zero, or None. Rows come in chunks through ``rows``.

    ``row_scale``: fp32 [n], the second-level scale, or None. For the input, in this order, where
    the descriptor has them: ``prescale`` fp32 [k], ``input_scale`` fp32 [1], ``input_zero`` int32
    [1].
    """

    def __init__(
        self, shards: Sequence[LoadedShard], plan: ChannelPlan | None, *, zero_points: bool
    ) -> None:
        self.shards = tuple(shards)
        self._plan = plan
        self._zero_points = zero_points
        self.n = sum(s.source.n + s.source.padding for s in shards)
        self.k = shards[0].source.k if plan is None else plan.k
        self.device = shards[0].device
        self.permutation = (
            None if plan is None or plan.order is None else plan.order.to(self.device)
        )
        self.row_scale = _row_scale(shards)
        self.prescale = self._ordered(shards[0].prescale())
        self.input_scale = shards[0].input_scale()
        self.input_zero = shards[0].input_zero()
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
        """x̂, fp32 [M, k], for x [M, K of x]: what is multiplied with the rows as they come."""
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
        """The same before it is quantised."""
        return self.prepare_input(replace(descriptor, activation=None), x)

    def in_stored_order(self, channels: torch.Tensor) -> torch.Tensor:
        """[M, k] → [M, K of x], every channel where the checkpoint has it."""
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
        """Scale and zero [n, G] of rows [start, stop), as in ``rows``, without their codes."""
        parts = [self._shard_row_scales(*run) for run in self._runs(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return _cat([scale for scale, _ in parts]), _cat([zero for _, zero in parts])

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, begin, end): the shards that rows [start, stop) come from, with their rows."""
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
        if self._plan is not None and self._plan.order is not None:
            order = self._plan.order.to(codes.device, torch.int64)
            codes = codes.index_select(1, order.clamp(min=0))
            if self._plan.padded:
                codes = codes.masked_fill(order < 0, 0)
        pad = (stop - start) - codes.shape[0]
        return StandardWeights(
            _pad_rows(codes, pad, self.blank_code(index)),
            *self._shard_row_scales(index, start, stop),
        )

    def blank_code(self, index: int) -> int:
        """The code of a shard's rows of padding, whose scales are 0."""
        scale, zero = self._shard_scales(index)
        # A scale of 0 makes any code mean zero, but e8m0 has no 0.
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
            shard = self.shards[index]
            scale = shard.scale()
            zero = shard.zero_in_codes() if self._zero_points else None
            if self._plan is not None:
                group_of = self._plan.group_of.to(shard.device)
                scale, zero = _columns(scale, group_of), _columns(zero, group_of)
            self._scales[index] = scale, zero
        return self._scales[index]

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        """fp32 [stop − start, K of x]: rows as stored, before any refinement (for self-checks)."""
        parts = []
        offset = 0
        for shard in self.shards:
            begin, end = max(start - offset, 0), min(stop - offset, shard.source.n)
            if begin < end:
                parts.append(shard.dequantize(begin, end))
            total = shard.source.n + shard.source.padding
            blank = min(stop - offset, total) - max(start - offset, shard.source.n)
            if blank > 0:
                parts.append(torch.zeros(blank, shard.source.k, device=shard.device))
            offset += total
        return torch.cat(parts) if parts else torch.zeros(0, self.shards[0].source.k)


def _columns(values: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """``values[:, index]``, without a copy where that changes nothing."""
    if values is None or torch.equal(index, torch.arange(values.shape[1], device=index.device)):
        return values
    return values.index_select(1, index)


def _pad_rows(tensor: torch.Tensor, rows: int, value: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows), value=value) if rows else tensor


def _zero_code(element: ElementType) -> int:
    """The code that means 0; 0 where none does."""
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
        # Rows of padding are zero whatever this is.
        scales.append(torch.nn.functional.pad(scale, (0, shard.source.padding), value=1))
    return torch.cat(scales)


def _cat(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present) if present else None


def to_standard_layout(
    descriptor: CompressedLinearDescriptor, weights: CompressedWeights
) -> StandardWeights:
    """The whole weight in standard layout: the bridge for backends without a layout of their own.

    Takes 1 byte per weight (more for dense types); backends that can should ask for chunks.
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


def from_standard_layout(
    scheme: CheckpointScheme,
    standard: StandardWeights,
    group_index: torch.Tensor | None = None,
    *,
    row_scale: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    input_zero: torch.Tensor | None = None,
    prescale: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Write a weight as a checkpoint of ``scheme`` holds it: the inverse of ``LoadedShard``'s
    ``codes``, ``scale``, ``zero`` and ``group_index`` for a weight that is not sharded.

    ``standard``: codes [N, K] in the checkpoint's channel order, scale and zero [N, G].
    ``group_index``: int [K], the group of each channel; None is ``k // group_size``.
    ``row_scale`` [N], ``input_scale`` [1], ``input_zero`` [1], ``prescale`` [K]: as ``LoadedShard``
    gives them. Returns the tensors by name, each in the first of its packings. Raises
    ``ValueError`` where the scheme cannot say what ``standard`` holds (an interleave, a shared
    scale that is not the same everywhere, a group index without a tensor for it).
    """
    n, k = standard.codes.shape
    extents = ShardSource("", scheme, n, k, 0, n, 0, k).extents
    plain = torch.arange(k) // max(scheme.weight.group_size(k), 1)
    if group_index is None:
        group_index = plain
    elif not any(t.role is Role.GROUP_INDEX for t in scheme.tensors) and not torch.equal(
        group_index.to(torch.int64), plain
    ):
        raise ValueError(f"{scheme}: a group index is given, but the scheme has no tensor for one")
    values = {
        Role.CODES: standard.codes,
        Role.SCALE: standard.scale,
        Role.ZERO: standard.zero,
        Role.GROUP_INDEX: group_index,
        Role.SHAPE: torch.tensor([n, k]),
        Role.ROW_SCALE: None if row_scale is None else row_scale.reshape(n, 1),
        Role.INPUT_SCALE: None if input_scale is None else input_scale.reshape(1, 1),
        Role.INPUT_ZERO: None if input_zero is None else input_zero.reshape(1, 1),
        Role.PRESCALE: None if prescale is None else prescale.reshape(k, 1),
    }
    out = {}
    for stored in scheme.tensors:
        value = values[stored.role]
        if value is not None:
            out[stored.name] = _store(stored, value, extents, scheme.weight)
        elif not stored.optional:
            raise ValueError(f"{scheme}: {stored.name} is needed, but there is no {stored.role}")
    return out


def _store(
    stored: StoredTensor, value: torch.Tensor, extents: dict[str, int], weight: WeightSpec
) -> torch.Tensor:
    if stored.role is Role.SHAPE or stored.role is Role.GROUP_INDEX:
        return value.to(torch_dtype(stored.dtype))
    if stored.reciprocal:
        value = 1 / widen_scale(value)
    dims = [axis for axis in stored.axes if isinstance(axis, str)]
    if len(dims) < 2 or "B" in dims:
        # Shared along the axes that the tensor lacks, or by blocks of rows.
        block = 1 if weight.scale is None else weight.scale.block_rows
        kept = value[::block] if "B" in dims else value if {"N", "K"} & set(dims) else value[:1]
        kept = kept if "G" in dims else kept[:, :1]
        whole = kept.repeat_interleave(block, 0)[: len(value)] if "B" in dims else kept
        if value.numel() and not bool((value == whole).all()):
            raise ValueError(
                f"{stored.name} has axes {stored.axes}, but its values differ along others"
            )
        kept = kept.t() if dims and dims[-1] in ("N", "B") else kept
        return kept.reshape(stored.shape(extents)).contiguous()
    if stored.interleave:
        raise ValueError(f"{stored.name}: cannot write interleave {stored.interleave!r}")
    if "G" in dims:
        value = torch.nn.functional.pad(value, (0, -value.shape[1] % stored.group_multiple))
    if dims[0] != "N":
        value = value.t()
    if stored.packing is None:
        raw = stored.role is Role.CODES and value.dtype == torch.uint8
        return (value.view(torch_dtype(stored.dtype)) if raw else value).contiguous()
    return pack(value, stored.packing, dims.index(stored.packing.axis))


def channel_plan(shard: LoadedShard) -> ChannelPlan | None:
    """The plan of one shard, None for weights without scales or channels."""
    if shard.source.scheme.weight.scale is None or shard.source.k == 0:
        return None
    return plan_channels(shard.group_index())
