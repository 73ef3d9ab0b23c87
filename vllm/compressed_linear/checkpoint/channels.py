# SPDX-License-Identifier: Apache-2.0
"""Reorder input channels so that every scale group is contiguous and equally long.

Activation order, a group that a tensor-parallel shard border cuts, and a short last group are the
same problem: channel k uses the scale of group ``group_of[k]``, and kernels need group
``k // group_size``. A gather of channels and a map of groups solve it without loss; no kernel ever
sees a ``g_idx``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SMALLEST_PLAIN_GROUP = 16
"""Below this size, padding groups with zero channels is cheaper than splitting them further."""

FILL_UNIT = 32


@dataclass(frozen=True)
class ChannelGather:
    """Gather of this rank's channels into equal groups.

    order: int32 [k], position in x of each channel of the kernel, −1 for a channel of zeros; None
    if channels keep their order. group_of: int64 [k // group_size], the checkpoint's group from
    which each group of the kernel takes its scale and zero point.
    """

    order: torch.Tensor | None
    group_of: torch.Tensor
    group_size: int

    @property
    def k(self) -> int:
        return len(self.group_of) * self.group_size

    @property
    def padded(self) -> bool:
        return self.order is not None and bool((self.order < 0).any())


def gather_channels(group_index: torch.Tensor) -> ChannelGather:
    """The gather of channels whose groups are ``group_index`` (int64 [K], K ≥ 1)."""
    index = group_index.to(torch.int64).cpu()
    ordered = bool((index[1:] >= index[:-1]).all())
    order = None if ordered else torch.argsort(index, stable=True)
    groups, counts = torch.unique_consecutive(
        index if order is None else index[order], return_counts=True
    )
    sizes = counts.tolist()
    size = math.gcd(*sizes)
    if size >= min(SMALLEST_PLAIN_GROUP, max(sizes)):
        group_of = torch.repeat_interleave(groups, counts // size)
        return ChannelGather(None if order is None else order.to(torch.int32), group_of, size)

    unit = min(FILL_UNIT, max(sizes))
    blocks = (counts + unit - 1) // unit
    source = torch.arange(len(index)) if order is None else order
    filled = torch.full((int(blocks.sum()) * unit,), -1, dtype=torch.int32)
    begin_in = torch.cumsum(counts, 0) - counts
    begin_out = (torch.cumsum(blocks, 0) - blocks) * unit
    position = torch.arange(len(index)) + torch.repeat_interleave(begin_out - begin_in, counts)
    filled[position] = source.to(torch.int32)
    return ChannelGather(filled, torch.repeat_interleave(groups, blocks), unit)
