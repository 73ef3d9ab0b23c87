# SPDX-License-Identifier: Apache-2.0
"""Permutations of a whole packed matrix that no rule along one axis can express.

Each undoes one packer's order and returns plain codes [N, second axis]. They are named in
``Packing.interleave``; a name that is not here is an error at load.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm.compressed_linear.layout import Packing

Undo = Callable[[torch.Tensor, Packing, int, int], torch.Tensor]
_UNDO: dict[str, Undo] = {}


def register_interleave(name: str) -> Callable[[Undo], Undo]:
    """Register the function that undoes interleave ``name``."""

    def add(function: Undo) -> Undo:
        _UNDO[name] = function
        return function

    return add


def uninterleave(stored: torch.Tensor, packing: Packing, n: int, second: int) -> torch.Tensor:
    """Stored tensor → [n, second]; ``ValueError`` for an unknown interleave."""
    if packing.interleave not in _UNDO:
        raise ValueError(
            f"unknown interleave {packing.interleave!r} (known: {', '.join(_UNDO) or 'none'})"
        )
    return _UNDO[packing.interleave](stored, packing, n, second)
