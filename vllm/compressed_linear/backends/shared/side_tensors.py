# SPDX-License-Identifier: Apache-2.0
"""Scales and zero points in tiles of 16 output channels, and the small tensors of a layer."""

from __future__ import annotations

import torch

from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype


def scale_dtype(d: CompressedLinearDescriptor) -> torch.dtype | None:
    """Dtype of prepared scales: the checkpoint's."""
    return None if d.weight.scale is None else torch_dtype(d.weight.scale.dtype)


def zero_dtype(d: CompressedLinearDescriptor) -> torch.dtype | None:
    """Dtype of prepared zero points."""
    zero = d.weight.zero
    if zero is None:
        return None
    # Integer zero points are at most 2^bits, which is exact in bfloat16.
    return torch.bfloat16 if zero.kind == "integer" else torch_dtype(zero.dtype)


def scale_bytes(d: CompressedLinearDescriptor, channels: int) -> int:
    """Bytes of the scales and zero points of that many output channels."""
    dtypes = (scale_dtype(d), zero_dtype(d))
    return channels * d.groups * sum(dtype.itemsize for dtype in dtypes if dtype is not None)


def put_tiles(target: torch.Tensor, values: torch.Tensor, start: int, what: str) -> None:
    """Write [rows, G] values of output channels from ``start`` on into [tiles, G, 16].

    Raises ``ValueError`` for integers that the target's dtype does not hold.
    """
    exact = values.to(target.dtype)
    # Every uint8 is exact in bfloat16, the dtype of integer zero points.
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


def small_tensors(
    weights: CompressedWeights, activation: ActivationSpec | None
) -> dict[str, torch.Tensor]:
    """Copies of the following that ``weights`` has: ``perm`` int32 [K], ``row_scale`` float32 [N],
    ``prescale`` float32 [K], and for a static ``activation`` ``input_scale`` float32 [1] and
    ``input_zero`` int32 [1]."""
    static = activation is not None and activation.needs_scale
    shifted = activation is not None and activation.needs_zero
    found = {
        "perm": (weights.permutation, torch.int32),
        "row_scale": (weights.row_scale, torch.float32),
        "prescale": (weights.prescale, torch.float32),
        "input_scale": (weights.input_scale if static else None, torch.float32),
        "input_zero": (weights.input_zero if shifted else None, torch.int32),
    }
    tensors = {
        name: values.to(dtype, copy=True, memory_format=torch.contiguous_format)
        for name, (values, dtype) in found.items()
        if values is not None
    }
    for name in ("input_scale", "input_zero"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(1)
    return tensors


def small_bytes(d: CompressedLinearDescriptor, activation: ActivationSpec | None) -> int:
    """Bytes of the ``small_tensors`` of a layer."""
    numbers = 0  # of four bytes each
    if d.channel_order is not None:
        numbers += d.k
    if d.weight.row_scale is not None:
        numbers += d.n
    if d.prescale is not None:
        numbers += d.k
    if activation is not None:
        numbers += activation.needs_scale + activation.needs_zero
    return 4 * numbers
