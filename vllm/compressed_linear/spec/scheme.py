# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint stores one weight: its tensors, their roles and axes, and standard layout.

Logical axes: ``"N"`` output channels, ``"K"`` input channels, ``"G"`` groups along K, ``"B"``
blocks of output channels that share scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from vllm.compressed_linear.spec import interleave
from vllm.compressed_linear.spec.descriptor import ActivationSpec, TransformSpec, WeightSpec
from vllm.compressed_linear.spec.elements import dense, dtype_name
from vllm.compressed_linear.spec.packing import Packing

Extents = Mapping[str, int]
"""Length of each logical axis, e.g. ``{"N": 4096, "K": 4096, "G": 32}``."""


class Role(StrEnum):
    """Role of a checkpoint tensor."""

    CODES = "codes"
    SCALE = "scale"
    ZERO = "zero"
    GROUP_INDEX = "group_index"
    SHAPE = "shape"
    ROW_SCALE = "row_scale"
    """Second-level scale of the weight: one for the tensor, or one for each output channel."""
    INPUT_SCALE = "input_scale"
    """Static scale of x, one number."""
    INPUT_ZERO = "input_zero"
    """Static zero point of x, one number."""
    OUTPUT_SCALE = "output_scale"
    """Static scale of y, one number."""
    OUTPUT_ZERO = "output_zero"
    """Static zero point of y, one number."""
    PRESCALE = "prescale"
    """Prescale of x, one factor for each input channel (``pre_quant_scale``)."""
    IGNORED = "ignored"
    """One number that files have and nothing needs."""


@dataclass(frozen=True)
class AxisSlice:
    """Positions of elements [start, start + length) of a logical axis in a stored dimension.

    Stored positions [first, first + count) cover them; the first ``skip`` unpacked elements belong
    to another rank or shard, whose part ends inside of a packed run.
    """

    first: int
    count: int
    skip: int
    length: int


def slice_axis(packing: Packing | None, axis: str, start: int, length: int) -> AxisSlice:
    """The stored positions of elements [start, start+length) of ``axis``, outward to whole runs."""
    if packing is None or packing.axis != axis:
        return AxisSlice(start, length, 0, length)
    block = start // packing.run
    first = block * packing.run_words
    skip = start - block * packing.run
    return AxisSlice(first, packing.words(skip + length), skip, length)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight as the checkpoint holds it.

    ``name``: last part of its name on disk (``"qweight"``). ``axes``: the logical axis of each
    stored dimension; an int is a fixed length. ``variants``: other packings under the same name,
    told apart by the stored shape. ``dtype`` is the container for packed tensors; for scales and
    float zero points it is the widest dtype that is accepted. ``group_multiple``: the G axis is
    stored rounded up to a multiple of this (AWQ gemv). ``interleave``: name of a permutation of the
    whole matrix, see ``interleave.py``; its shape on disk is then its own. ``reciprocal``: scales
    are stored as divisors (compressed-tensors' NVFP4): the scale is 1 / stored, in fp32.
    ``flat``: files may store it in another shape with as many elements, in row-major order.
    ``written_as``: another dtype of the same size under which files have the bits (MLX: uint32).
    """

    name: str
    role: Role
    dtype: str
    axes: tuple[str | int, ...]
    packing: Packing | None = None
    variants: tuple[Packing, ...] = ()
    optional: bool = False
    group_multiple: int = 1
    interleave: str = ""
    reciprocal: bool = False
    written_as: str = ""
    flat: bool = False

    @property
    def packings(self) -> tuple[Packing | None, ...]:
        return (self.packing, *self.variants)

    def shape(self, extents: Extents, packing: Packing | None = None) -> tuple[int, ...]:
        """Stored shape for logical ``extents`` under ``packing`` (default: the first one)."""
        if self.interleave:
            return interleave.stored_shape(
                self.interleave, [a for a in self.axes if isinstance(a, str)], extents
            )
        packing = packing or self.packing
        shape = []
        for axis in self.axes:
            length = axis if isinstance(axis, int) else extents[axis]
            if axis == "G":
                length = -(-length // self.group_multiple) * self.group_multiple
            if packing is not None and axis == packing.axis:
                length = packing.words(length)
            shape.append(length)
        return tuple(shape)

    def packing_of(self, shape: tuple[int, ...], extents: Extents) -> Packing | None:
        """The packing whose shape for ``extents`` is ``shape``; ``ValueError`` if none is."""
        for packing in self.packings:
            if self.shape(extents, packing) == shape:
                return packing
        raise ValueError(
            f"has shape {list(shape)}, expected "
            + " or ".join(str(list(self.shape(extents, p))) for p in dict.fromkeys(self.packings))
        )


@dataclass(frozen=True)
class StandardWeights:
    """Some rows of a weight in standard layout.

    codes: uint8 [n, K], or the float tensor itself for 16- and 32-bit element types.
    scale: [n, G] in the checkpoint's dtype (uint8 for e8m0), or None. zero: [n, G], uint8 for
    integer zero points and float otherwise, or None. Group of channel k is ``k // (K / G)``.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None


@dataclass(frozen=True)
class CheckpointScheme:
    """Description of one weight by a format: meaning, storage, and preparation of the layer's
    input.

    ``symmetric``: the setting of the configuration that says that all zero points are the middle
    code, as it is written there (``"sym: true"``); empty if it says nothing, or the contrary. The
    file may still have zero points: ``checkpoint/symmetry.py`` says what they mean then. ``note``:
    for the plan. ``zero_is_off``: a static scale of 0 means that x, or y, was not calibrated and
    stays as it is.
    """

    weight: WeightSpec
    tensors: tuple[StoredTensor, ...]
    activation: ActivationSpec | None = None
    transform: TransformSpec | None = None
    symmetric: str = ""
    note: str = ""
    output_activation: ActivationSpec | None = None
    zero_is_off: bool = False

    def __str__(self) -> str:
        zero = ", zero points" if self.weight.zero else ""
        if self.symmetric:
            zero = ", symmetric"
        scale = self.weight.scale
        group = "" if scale is None else f", group {scale.group_size}"
        if scale is not None and scale.granularity == "block":
            group = f", block {scale.block_rows}x{scale.group_size}"
        activation = "" if self.activation is None else f", x as {self.activation}"
        output = "" if self.output_activation is None else f", y as {self.output_activation}"
        return f"{self.weight.element}{group}{zero}{activation}{output}"


def dense_scheme(dtype: torch.dtype) -> CheckpointScheme:
    """How the checkpoint stores an unquantized weight: ``weight`` [N, K]."""
    return CheckpointScheme(
        WeightSpec(dense(dtype)),
        (StoredTensor("weight", Role.CODES, dtype_name(dtype), ("N", "K")),),
    )
