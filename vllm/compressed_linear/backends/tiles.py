# SPDX-License-Identifier: Apache-2.0
"""Scales and zero points beside packed tiles of 16 output channels."""

from __future__ import annotations

import torch

from vllm.compressed_linear import native
from vllm.compressed_linear.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.numerics import torch_dtype


def scale_dtype(d: CompressedLinearDescriptor) -> torch.dtype | None:
    """What scales are kept in: the checkpoint's dtype."""
    return None if d.weight.scale is None else torch_dtype(d.weight.scale.dtype)


def zero_dtype(d: CompressedLinearDescriptor) -> torch.dtype | None:
    """What zero points are kept in."""
    zero = d.weight.zero
    if zero is None:
        return None
    # Zero points of integers go up to 2^bits, which bfloat16 holds exactly.
    return torch.bfloat16 if zero.kind == "integer" else torch_dtype(zero.dtype)


def put_tiles(target: torch.Tensor, values: torch.Tensor, start: int, what: str) -> None:
    """Writes [rows, G] values of output channels from ``start`` on into [tiles, G, 16].

    Raises ``ValueError`` for integers that the target's dtype does not hold.
    """
    exact = values.to(target.dtype)
    # bfloat16, what integer zero points become, holds every uint8.
    plain = values.is_floating_point() or values.dtype == torch.uint8
    if not plain and not torch.equal(exact.to(values.dtype), values):
        raise ValueError(
            f"{what}: zero points run from {int(values.min())} to {int(values.max())}, "
            "expected 0 to 256"
        )
    missing = -len(exact) % native.TILE
    if missing:
        exact = torch.nn.functional.pad(exact, (0, 0, 0, missing))
    tiles = exact.unflatten(0, (-1, native.TILE)).transpose(1, 2)
    target[start // native.TILE : start // native.TILE + len(tiles)] = tiles
