# SPDX-License-Identifier: Apache-2.0
"""Plans for channels: for any assignment to groups, nothing is lost and groups become equal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm.compressed_linear.checkpoint.channels import (
    FILL_UNIT,
    SMALLEST_PLAIN_GROUP,
    ChannelGather,
    gather_channels,
)


@st.composite
def group_indices(draw: st.DrawFn) -> torch.Tensor:
    """Plain groups, ones cut at both ends, short last ones, shuffled ones, and anything at all."""
    kind = draw(st.sampled_from(["plain", "cut", "shuffled", "anything", "sorted"]))
    k = draw(st.integers(1, 200))
    if kind in ("anything", "sorted"):
        values = draw(st.lists(st.integers(0, 6), min_size=k, max_size=k))
        return torch.tensor(sorted(values) if kind == "sorted" else values)
    size = draw(st.sampled_from([1, 4, 8, 16, 32, 48, 128]))
    start = draw(st.integers(0, size - 1)) if kind == "cut" else 0
    index = (torch.arange(k) + start) // size
    if kind == "shuffled":
        seed = draw(st.integers(0, 2**31))
        index = index[torch.randperm(k, generator=torch.Generator().manual_seed(seed))]
    return index


def gathered(gather: ChannelGather, k: int) -> torch.Tensor:
    return torch.arange(k) if gather.order is None else gather.order.long()


@given(group_indices())
def test_every_channel_keeps_its_group(index: torch.Tensor) -> None:
    gather = gather_channels(index)
    order = gathered(gather, len(index))
    assert len(order) == gather.k == len(gather.group_of) * gather.group_size
    real = order >= 0
    assert sorted(order[real].tolist()) == list(range(len(index)))
    kernel_group = torch.arange(gather.k) // gather.group_size
    assert torch.equal(gather.group_of[kernel_group][real], index[order[real]])
    assert gather.padded == bool((~real).any())
    assert gather.order is None or gather.order.dtype == torch.int32


@given(group_indices())
def test_products_are_what_they_were(index: torch.Tensor) -> None:
    """x̂ ŵ with equal groups of consecutive channels equals x w with any groups."""
    gather = gather_channels(index)
    k = len(index)
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(-8, 8, (5, k), generator=generator).double()
    scale = torch.rand(5, int(index.max()) + 1, generator=generator, dtype=torch.float64)
    x = torch.randn(3, k, generator=generator, dtype=torch.float64)
    order = gathered(gather, k)
    # What backends get for a channel of zeros must not matter, so it is made large.
    kernel_codes = torch.where(order < 0, 99.0, codes[:, order.clamp(min=0)])
    kernel_x = torch.where(order < 0, 0.0, x[:, order.clamp(min=0)])
    grouped = kernel_codes.unflatten(1, (-1, gather.group_size)) * scale[:, gather.group_of, None]
    result = kernel_x @ grouped.flatten(1).t()
    torch.testing.assert_close(result, x @ (codes * scale[:, index]).t(), rtol=1e-12, atol=1e-12)


@given(group_indices())
def test_groups_are_not_needlessly_small_nor_fillings_large(index: torch.Tensor) -> None:
    gather = gather_channels(index)
    counts = torch.unique_consecutive(torch.sort(index).values, return_counts=True)[1]
    assert gather.group_size >= min(SMALLEST_PLAIN_GROUP, int(counts.max()))
    assert gather.k < len(index) + len(counts) * FILL_UNIT
    if not gather.padded:
        assert gather.k == len(index)


@pytest.mark.parametrize("group", [16, 32, 128])
def test_a_trivial_index_needs_no_gather(group: int) -> None:
    gather = gather_channels(torch.arange(4 * group) // group)
    assert gather.order is None
    assert gather.group_size == group
    assert gather.group_of.tolist() == [0, 1, 2, 3]


def test_one_group_is_one_group() -> None:
    gather = gather_channels(torch.zeros(70, dtype=torch.int32))
    assert (gather.order, gather.group_size, gather.group_of.tolist()) == (None, 70, [0])


def test_a_group_cut_by_a_shard_border_is_split_without_a_gather() -> None:
    gather = gather_channels((torch.arange(96) + 32) // 64)
    assert gather.order is None
    assert gather.group_size == 32
    assert gather.group_of.tolist() == [0, 1, 1]


def test_a_short_last_group_is_filled_up() -> None:
    gather = gather_channels(torch.arange(100) // 32)
    assert gather.order is not None
    assert gather.group_size == 32
    assert gather.order.tolist() == [*range(100), *[-1] * 28]


def test_channels_of_a_group_stay_in_order() -> None:
    """So that neighbouring shards with the same groups get the same gather."""
    gather = gather_channels(torch.tensor([1, 0] * 32))
    assert gather.order is not None
    assert gather.order.tolist() == [*range(1, 64, 2), *range(0, 64, 2)]
