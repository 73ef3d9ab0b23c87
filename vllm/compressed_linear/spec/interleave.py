# SPDX-License-Identifier: Apache-2.0
"""Interleaved layouts of a whole matrix, which a ``Packing`` along one axis cannot express.

Each entry inverts the order of one packer, written as a permutation of named digits of the indices;
``StoredTensor.interleave`` has its name. All of them keep blocks of consecutive output channels
together, so rows can be read without the rest of the matrix.

Sources: AutoAWQ ``awq/modules/linear/gemv_fast.py`` (``pack_intweight``) and ``marlin.py``; Marlin
``marlin/__init__.py`` (``_get_perms``, ``Layer.pack``), whose layout AutoGPTQ's and AutoAWQ's
Marlin files have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Interleave:
    """The order of one packer.

    ``rows`` consecutive output channels are ``positions`` consecutive positions of the stored
    dimension ``dim``. ``shape(n, second)``: the shape on disk, for n and ``second`` that are
    multiples of ``multiples``. ``undo(part)`` turns whole blocks into [their rows, second]:
    codes uint8, scales in their dtype.
    """

    rows: int
    positions: int
    dim: int
    multiples: tuple[int, int]
    shape: Callable[[int, int], tuple[int, int]]
    undo: Callable[[torch.Tensor], torch.Tensor]


def stored_shape(name: str, axes: Sequence[str], extents: Mapping[str, int]) -> tuple[int, ...]:
    """Shape on disk of a tensor interleaved as ``name``, of two logical ``axes``, for ``extents``.

    Raises ``ValueError`` for extents that the packer does not support.
    """
    way = _find(name)
    first, second = axes
    for axis, multiple in zip((first, second), way.multiples, strict=True):
        if extents[axis] % multiple:
            raise ValueError(
                f"is interleaved as {name}, which needs {axis} a multiple of "
                f"{multiple}, but {axis} is {extents[axis]}"
            )
    return way.shape(extents[first], extents[second])


def uninterleave(tensor: torch.Tensor, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a whole tensor interleaved as ``name`` → [stop − start, second]."""
    way = _find(name)
    first, last = start // way.rows, -(-stop // way.rows)
    part = tensor.narrow(way.dim, first * way.positions, (last - first) * way.positions)
    return way.undo(part)[start - first * way.rows :][: stop - start]


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Integers [..., w] → uint8 [..., w · nibbles in each], lowest first."""
    raw = words.contiguous().view(torch.uint8)
    return torch.stack((raw & 15, raw >> 4), -1).flatten(-2)


def _undo_awq_gemv_fast(part: torch.Tensor) -> torch.Tensor:
    """int16 [N/4, K] → uint8 [N, K].

    64 words hold 4 rows × 64 channels, row by row; of each 32 channels, number a·8 + b·2 + c is
    stored at b·8 + c·4 + a.
    """
    blocks, k = part.shape
    a_last = _nibbles(part).view(blocks, k // 64, 4, 2, 4, 2, 4)  # block, 64s, row, 32s, b, c, a
    return a_last.permute(0, 2, 1, 3, 6, 4, 5).reshape(blocks * 4, k)


def _undo_marlin_codes(part: torch.Tensor) -> torch.Tensor:
    """int32 [K/16, 2·N] → uint8 [N, K].

    128 words hold 16 channels × 64 rows as the fragments of a tensor-core tile: digits c q j l h m
    of the nibble's number say channel 8·m + 2·q + l and row 16·j + 8·h + c.
    """
    tiles, words = part.shape
    digits = _nibbles(part).view(tiles, words // 128, 8, 4, 4, 2, 2, 2)  # k16 n64 c q j l h m
    return digits.permute(1, 4, 6, 2, 0, 7, 3, 5).reshape(words // 2, tiles * 16)


def _undo_marlin_scales(part: torch.Tensor) -> torch.Tensor:
    """[G, N] → [N, G]: of 64 scales, number 8·j + i is stored at 8·i + j; with only one group, of
    32 scales number 8·u + 2·i + v is stored at 8·i + 2·u + v."""
    groups, n = part.shape
    if groups == 1:
        return part.view(n // 32, 4, 4, 2).permute(0, 2, 1, 3).reshape(n, 1)
    return part.view(groups, n // 64, 8, 8).permute(1, 3, 2, 0).reshape(n, groups)


_INTERLEAVES: dict[str, Interleave] = {
    "awq_gemv_fast": Interleave(4, 1, 0, (4, 64), lambda n, k: (n // 4, k), _undo_awq_gemv_fast),
    "marlin_codes": Interleave(
        64, 128, 1, (64, 16), lambda n, k: (k // 16, n * 2), _undo_marlin_codes
    ),
    "marlin_scales": Interleave(64, 64, 1, (64, 1), lambda n, g: (g, n), _undo_marlin_scales),
}


def _find(name: str) -> Interleave:
    if name not in _INTERLEAVES:
        known = ", ".join(_INTERLEAVES)
        raise ValueError(f"unknown interleave {name!r} (known: {known})")
    return _INTERLEAVES[name]
