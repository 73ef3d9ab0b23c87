# SPDX-License-Identifier: Apache-2.0
"""Values of whole tensors whose meaning the part of one rank does not tell.

A group index of zeros only has no order, and zero points of one value only may mark a symmetric
weight. Slices of other tensors can look the same, so values are counted before slicing.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.symmetry import Counts
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.spec.packing import Packing, ZeroBump
from vllm.compressed_linear.spec.scheme import Role, StoredTensor


def count_values(
    member: ShardSource, stored: StoredTensor, packing: Packing | None, tensor: torch.Tensor
) -> Counts | None:
    """How often each value occurs in ``tensor``, which holds the whole logical weight ``member``.

    None for tensors of which no count is needed. Zero points are counted without what their version
    adds to them. Empty if there are several values and they are not codes.
    """
    role = stored.role
    if role is not Role.GROUP_INDEX and not (role is Role.ZERO and member.scheme.symmetric):
        return None
    if tensor.is_meta:
        return None
    if packing is None:
        return _only_value(tensor)
    if packing.single:
        tensor = tensor.to(torch_dtype(packing.container))
    plain = {stored.name: replace(packing, zero_bump=ZeroBump.NONE)}
    fields, n = LoadedShard(member, {stored.name: tensor}, plain), member.n
    if tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
        # Equal containers hold equal values, and one run of rows has all of them.
        first = fields.stored_values(role, min(n, packing.run))
        if found := _only_value(first):
            return dict.fromkeys(found, n * first.shape[1])
    counts = torch.bincount(fields.stored_values(role, n).flatten().cpu()).tolist()
    return {value: count for value, count in enumerate(counts) if count}


def _only_value(tensor: torch.Tensor) -> Counts:
    """The value that all of ``tensor`` has, if it is an integer; else empty."""
    if not tensor.numel():
        return {}
    low, high = (float(number) for number in tensor.aminmax())
    return {int(low): tensor.numel()} if low == high and low.is_integer() else {}
