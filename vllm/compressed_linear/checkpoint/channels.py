# SPDX-License-Identifier: Apache-2.0
"""From any assignment of input channels to groups, to equal groups of consecutive channels.

Activation order, a group that a tensor-parallel shard border cuts, and a short last group are the
same problem: channel k uses the scale of group ``group_of[k]``, and kernels want group
``k // group_size``. A gather of channels and a map of groups solve it without loss; no kernel ever
sees a ``g_idx``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SMALLEST_PLAIN_GROUP = 16
"""Below this, filling groups up with zero channels is cheaper than splitting them further."""

FILL_UNIT = 32


@dataclass(frozen=True)
class ChannelPlan:
    """How local channels become equal groups.

    order: int32 [k], position in x of each channel the kernel sees, −1 for a channel of zeros; None
    when channels stay as they are. group_of: int64 [k // group_size], which of the checkpoint's
    groups each of the kernel's groups takes its scale and zero point from.
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


def plan_channels(group_index: torch.Tensor) -> ChannelPlan:
    """Plan for channels whose groups are ``group_index`` (int64 [K], K ≥ 1)."""
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
        return ChannelPlan(None if order is None else order.to(torch.int32), group_of, size)

    unit = min(FILL_UNIT, max(sizes))
    blocks = (counts + unit - 1) // unit
    source = torch.arange(len(index)) if order is None else order
    filled = torch.full((int(blocks.sum()) * unit,), -1, dtype=torch.int32)
    begin_in = torch.cumsum(counts, 0) - counts
    begin_out = (torch.cumsum(blocks, 0) - blocks) * unit
    position = torch.arange(len(index)) + torch.repeat_interleave(begin_out - begin_in, counts)
    filled[position] = source.to(torch.int32)
    return ChannelPlan(filled, torch.repeat_interleave(groups, blocks), unit)
