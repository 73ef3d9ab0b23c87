# SPDX-License-Identifier: Apache-2.0
"""Permutations of a whole stored matrix that no rule along one axis can express.

Each entry undoes one packer's order. They are named in ``StoredTensor.interleave``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.compressed_linear.layout import StoredTensor


@dataclass(frozen=True)
class Interleave:
    """``undo(stored, n, second)`` → [n, second]; ``shape(extents)`` is the shape on disk."""

    undo: Callable[[torch.Tensor, int, int], torch.Tensor]
    shape: Callable[[Mapping[str, int]], tuple[int, ...]]


_INTERLEAVES: dict[str, Interleave] = {}


def _find(name: str) -> Interleave:
    if name not in _INTERLEAVES:
        known = ", ".join(_INTERLEAVES) or "none"
        raise ValueError(f"unknown interleave {name!r} (known: {known})")
    return _INTERLEAVES[name]


def stored_shape(stored: StoredTensor, extents: Mapping[str, int]) -> tuple[int, ...]:
    """Shape on disk of an interleaved tensor for logical ``extents``."""
    return _find(stored.interleave).shape(extents)


def uninterleave(tensor: torch.Tensor, stored: StoredTensor, n: int, second: int) -> torch.Tensor:
    """The whole stored tensor → [n, second]: codes uint8, or scales in their dtype."""
    return _find(stored.interleave).undo(tensor, n, second)
