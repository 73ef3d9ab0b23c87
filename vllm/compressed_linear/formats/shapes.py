# SPDX-License-Identifier: Apache-2.0
"""Shapes of a weight for which its tensors in a file have the shapes that a scheme gives them."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.shard import ShardSource
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

Known = Sequence[tuple[StoredTensor, TensorHeader]]
"""Tensors of a scheme that the file has."""


def has_shape(scheme: CheckpointScheme, known: Known, n: int, k: int) -> bool:
    """Whether all ``known`` tensors have their shapes for a weight [n, k]."""
    extents = ShardSource("", scheme, n, k, 0, n, 0, k).extents
    for stored, header in known:
        try:
            stored.packing_of(header.shape, extents)
        except ValueError:
            return False
    return True


def possible_shapes(scheme: CheckpointScheme, known: Known) -> list[tuple[int, int]]:
    """Shapes [n, k] that single tensors of ``scheme`` suggest; few, and perhaps not one fits."""
    rows: set[int] = set()
    columns: set[int] = set()
    for stored, header in known:
        if stored.role is Role.SHAPE or stored.interleave or len(header.shape) != len(stored.axes):
            continue
        for axis, length in zip(stored.axes, header.shape, strict=True):
            if axis == "G":
                columns.add(length * max(scheme.weight.group_size(0), 0))
                continue
            found = rows if axis == "N" else columns
            packed = [p for p in stored.packings if p is not None and p.axis == axis]
            found.update(int(length * packing.pack_factor) for packing in packed)
            if not packed and axis in ("N", "K"):
                found.add(length)
    return [(n, k) for n in sorted(rows) for k in sorted(columns) if n and k]
