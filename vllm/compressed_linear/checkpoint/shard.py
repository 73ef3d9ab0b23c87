# SPDX-License-Identifier: Apache-2.0
"""One logical weight of a checkpoint: this rank's part, as stored, and its decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from vllm.compressed_linear.checkpoint.symmetry import Counts, ZeroReading, read_zeros
from vllm.compressed_linear.spec.elements import widen_scale
from vllm.compressed_linear.spec.interleave import uninterleave
from vllm.compressed_linear.spec.packing import Packing, ZeroBump, unpack
from vllm.compressed_linear.spec.scheme import (
    AxisSlice,
    CheckpointScheme,
    Role,
    StoredTensor,
    dense_scheme,
    slice_axis,
)

CHUNK_BYTES = 4 << 20
"""Size limit of one chunk of rows in standard layout, in bytes."""


class CheckpointError(ValueError):
    """The checkpoint's data is damaged or contradicts its configuration."""


@dataclass(frozen=True)
class ShardSource:
    """Position of this rank's part of one logical weight in the checkpoint.

    ``name``: the layer's name in the checkpoint, for messages. ``full_n``, ``full_k``: shape of the
    whole weight on disk. This rank has rows [n_start, n_start + n) and channels
    [k_start, k_start + k), followed by ``padding`` rows of zeros (padded vocabularies).
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

        With a group index all groups are kept; otherwise every group that this rank's channels
        touch, including groups that a shard border cuts. The same holds for blocks of rows.
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

        Tensors with an interleave of the whole matrix have no contiguous parts and are kept whole.
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
        """Whether the tensor's shape fits several of its packings; it is kept whole then, until the
        other tensors are loaded and decide. Only possible for short axes."""
        shapes = {stored.shape(self.extents, packing) for packing in stored.packings}
        return bool(stored.variants) and len(shapes) < len(stored.packings)

    def kept_shape(self, stored: StoredTensor, packing: Packing | None) -> tuple[int, ...]:
        """Shape of this rank's part of ``stored``."""
        if stored.interleave:
            return stored.shape(self.extents)
        return tuple(
            int(axis) if part is None else part.count
            for axis, part in zip(stored.axes, self.slices(stored, packing), strict=True)
        )


@dataclass(frozen=True)
class StoredCodes:
    """The codes of a shard as stored, for backends that repack them in a single pass.

    ``skips``: for each logical axis, the number of elements before this rank's first one.
    """

    stored: StoredTensor
    tensor: torch.Tensor
    packing: Packing | None
    skips: Mapping[str, int]


@dataclass
class LoadedShard:
    """This rank's part of one logical weight, as stored.

    ``packings``: the packing of each tensor in this file. ``counts``: of the values of whole
    tensors, where their meaning depends on the parts of other ranks (``counts.py``).
    """

    source: ShardSource
    tensors: Mapping[str, torch.Tensor]
    packings: Mapping[str, Packing | None] = field(default_factory=dict)
    counts: Mapping[str, Counts] = field(default_factory=dict)

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
            return uninterleave(tensor, stored.interleave, begin + start, begin + stop).narrow(
                1, first, count
            )
        axes = [axis for axis in stored.axes if isinstance(axis, str)]
        if packing is not None and packing.single and "N" not in axes:
            tensor = unpack(tensor, packing, tensor.shape[-1])  # elementwise
        if not axes:
            return tensor.reshape(1, 1).expand(stop - start, self.source.span(second)[1])
        # Dimensions without a logical axis have length 1: [N, 1], [N / 128, 1, K / 128, 1].
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
        # Drop the elements before this rank's first row, so that rows are counted from it.
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
        """The codes as stored."""
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
        """Prescale of x, fp32 [K] in the checkpoint's channel order, or None."""
        return self._numbers(Role.PRESCALE, self.source.k)

    def input_zero(self) -> torch.Tensor | None:
        """Static zero point of x, int32 [1], 0 is the middle of the range; or None."""
        return self._point(Role.INPUT_ZERO)

    def output_scale(self) -> torch.Tensor | None:
        """Static scale of y, fp32 [1], or None."""
        return self._numbers(Role.OUTPUT_SCALE, 1)

    def output_zero(self) -> torch.Tensor | None:
        """Static zero point of y, as ``input_zero``."""
        return self._point(Role.OUTPUT_ZERO)

    def _point(self, role: Role) -> torch.Tensor | None:
        stored = self.stored(role)
        return None if stored is None else self.tensors[stored.name].reshape(1).to(torch.int32)

    def _numbers(self, role: Role, length: int) -> torch.Tensor | None:
        """A scalar or per-channel tensor, as fp32 [length]."""
        stored = self.stored(role)
        if stored is None:
            return None
        numbers = widen_scale(self.tensors[stored.name]).flatten().expand(length)
        return 1 / numbers if stored.reciprocal else numbers

    def zero(self) -> torch.Tensor | None:
        """[n, groups kept], or None. The middle code throughout if ``zero_reading`` says so."""
        return self._zero_rows(0, self.source.n)

    def _zero_rows(self, start: int, stop: int) -> torch.Tensor | None:
        reading, spec = self.zero_reading, self.source.scheme.weight.zero
        if reading is None or not reading.middle or spec is None:
            return self._matrix(Role.ZERO, "G", start, stop)
        middle = 1 << (self.source.scheme.weight.element.bits - 1)
        scale = self._scale_rows(start, stop)
        assert scale is not None
        if spec.kind == "minimum":
            return widen_scale(scale) * (-middle if spec.negated else middle)
        return torch.full(scale.shape, middle, dtype=torch.uint8, device=scale.device)

    @cached_property
    def zero_reading(self) -> ZeroReading | None:
        """Meaning of the zero points under a configuration that says symmetric; None if it does
        not say so, or the stored values are not known."""
        scheme, stored = self.source.scheme, self.stored(Role.ZERO)
        if not scheme.symmetric or scheme.weight.zero is None:
            return None
        if stored is None:
            return ZeroReading(True)
        if (counts := self.counts.get(stored.name)) is None:
            return None
        packing = self.packing(stored)
        bump = 0 if packing is None or packing.zero_bump is ZeroBump.NONE else 1
        return read_zeros(scheme.symmetric, scheme.weight.element.bits, bump, counts)

    def stored_values(self, role: Role, stop: int) -> torch.Tensor:
        """Values of a tensor with axes N and G for rows [0, stop), unpacked, as they are stored."""
        values = self._matrix(role, "G", 0, stop)
        assert values is not None
        return values

    def in_codes(
        self, zero: torch.Tensor | None, scale: torch.Tensor | None
    ) -> torch.Tensor | None:
        """``zero()`` in units of codes: as stored, or a stored minimum divided by ``scale()``
        (fp32, one rounding). A scale of 0 has zero point 0."""
        spec = self.source.scheme.weight.zero
        if zero is None or spec is None or spec.kind != "minimum":
            return zero
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
        # All 0 or all −1 is how tools say that channels are in order.
        if stored is not None and set(self.counts.get(stored.name, ())) not in ({0}, {-1}):
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
        """Decode rows [start, stop) to fp32 [stop − start, K], see ``dequantize_runs``."""
        return self.dequantize_runs([(start, stop)])

    def dequantize_runs(self, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Decode the rows of all ``runs`` [start, stop) to fp32 [rows, K].

        Self-checks compare with this, so it follows the checkpoint's own indices and shares no
        code with the gather of channels.
        """
        second = self.row_scale()
        group = None if self.source.scheme.weight.scale is None else self.group_index()
        return torch.cat([self._dequantize(start, stop, group, second) for start, stop in runs])

    def _dequantize(
        self, start: int, stop: int, group: torch.Tensor | None, rows: torch.Tensor | None
    ) -> torch.Tensor:
        weight = self.source.scheme.weight
        values = weight.element.decode(self.codes(start, stop))
        # Only the scales of these rows: self-checks ask for single rows.
        scale = self._scale_rows(start, stop)
        zero = self._zero_rows(start, stop)
        second = 1 if rows is None else rows[start:stop].unsqueeze(1)
        if scale is None or group is None:
            return values * second
        group = group.to(values.device)
        wide = widen_scale(scale)[:, group]
        spec = weight.zero
        if zero is None or spec is None:
            return values * wide * second
        subtract = zero.to(torch.float32)[:, group] * (-1 if spec.negated else 1)
        if spec.kind == "minimum":
            return (values * wide - subtract) * second
        return (values - subtract) * wide * second


def dense_shard(name: str, weight: torch.Tensor) -> LoadedShard:
    """This rank's part ``weight`` [N, K] of an unquantized layer, as a shard."""
    n, k = weight.shape
    source = ShardSource(name, dense_scheme(weight.dtype), n, k, 0, n, 0, k)
    return LoadedShard(source, {"weight": weight})
