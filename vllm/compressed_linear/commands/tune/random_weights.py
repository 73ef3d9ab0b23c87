# SPDX-License-Identifier: Apache-2.0
"""Random weights matching a descriptor; used by tune and benchmarks."""

from __future__ import annotations

import torch

from vllm.compressed_linear.checkpoint.channels import ChannelGather
from vllm.compressed_linear.checkpoint.facts import ShardNumbers
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import dtype_name, torch_dtype
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

SEED = 8913


def random_weights(
    descriptor: CompressedLinearDescriptor, device: torch.device | str = "cpu"
) -> CompressedWeights:
    """Random weights matching ``descriptor``, on ``device``: finite numbers, and a random order of
    channels if it has one. Codes are stored in one byte each and prepared as those of a checkpoint.
    Equal descriptors give equal numbers."""
    d, weight = descriptor, descriptor.weight
    element = weight.element
    generator = torch.Generator().manual_seed(SEED)
    tensors: dict[str, torch.Tensor] = {}
    stored: list[StoredTensor] = []

    def add(name: str, role: Role, axes: tuple[str | int, ...], values: torch.Tensor) -> None:
        stored.append(StoredTensor(name, role, dtype_name(values.dtype), axes))
        tensors[name] = values

    shape = (d.n, d.in_features)
    if element.kind == "dense":
        values = torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.05
        add("weight", Role.CODES, ("N", "K"), values.to(element.dense_dtype))
    else:
        codes = torch.randint(1 << element.bits, shape, generator=generator, dtype=torch.uint8)
        if element.kind != "integer":
            # No codes of infinities and NaN.
            finite = torch.isfinite(element.table())
            codes[~finite[codes.long()]] = 0
        add("codes", Role.CODES, ("N", "K"), codes)
    groups = weight.groups(d.in_features)
    gather = None
    if weight.scale is not None:
        axes: tuple[str | int, ...] = ("N", "G")
        scale = _scales((d.n, groups), weight.scale.dtype, generator)
        if weight.scale.granularity == "tensor":
            axes, scale = (1,), scale[:1, 0]
        elif weight.scale.granularity == "block":
            axes, scale = ("B", "G"), scale[: -(-d.n // weight.scale.block_rows)]
        add("scale", Role.SCALE, axes, scale)
        gather = _gather(d, groups, generator)
        if gather.order is not None:
            add("g_idx", Role.GROUP_INDEX, ("K",), _group_index(gather, d.in_features))
    if weight.zero is not None:
        zero = torch.rand(d.n, groups, generator=generator) * ((1 << element.bits) - 1)
        add("zero", Role.ZERO, ("N", "G"), zero.to(torch_dtype(weight.zero.dtype)))
    if weight.row_scale is not None:
        rows = 0.5 + torch.rand(d.n, generator=generator)
        add("row_scale", Role.ROW_SCALE, ("N",), rows.to(torch_dtype(weight.row_scale)))
    if d.prescale is not None:
        channels = 0.5 + torch.rand(d.in_features, generator=generator)
        add("prescale", Role.PRESCALE, ("K",), channels.to(torch_dtype(d.prescale)))
    if d.activation is not None and d.activation.needs_scale:
        # Normal numbers reach 4. Scales of groups are multiples of this one, up to 448 times.
        reach = d.activation.maximum * (448 if d.activation.scale_dtype == "float8_e4m3fn" else 1)
        add("input_scale", Role.INPUT_SCALE, (1,), torch.tensor([4 / reach]))
    if d.activation is not None and d.activation.needs_zero:
        add("input_zero", Role.INPUT_ZERO, (1,), torch.tensor([3], dtype=torch.int32))
    source = ShardSource(
        f"random weights for {d}",
        CheckpointScheme(weight, tuple(stored), d.activation, d.transform),
        *(d.n, d.in_features),
        *(0, d.n),
        *(0, d.in_features),
    )
    shard = LoadedShard(source, {name: tensor.to(device) for name, tensor in tensors.items()})
    scales = shard.scale()
    numbers = ShardNumbers(scales, shard.in_codes(shard.zero(), scales), gather)
    return CompressedWeights([shard], [numbers], zero_points=weight.zero is not None)


def _scales(shape: tuple[int, int], dtype: str, generator: torch.Generator) -> torch.Tensor:
    """Scales between 0.01 and 0.02, or powers of two near them."""
    if dtype == "e8m0":
        return torch.randint(119, 122, shape, generator=generator, dtype=torch.uint8)
    return (0.01 + 0.01 * torch.rand(shape, generator=generator)).to(torch_dtype(dtype))


def _gather(
    d: CompressedLinearDescriptor, groups: int, generator: torch.Generator
) -> ChannelGather:
    # With padding there are more groups than in the checkpoint, so several share a scale.
    group_of = torch.arange(d.groups) % max(groups, 1)
    if d.channel_order is None:
        return ChannelGather(None, group_of, d.group_size)
    order = torch.full((d.k,), -1, dtype=torch.int32)
    order[: d.in_features] = torch.arange(d.in_features, dtype=torch.int32)
    return ChannelGather(order[torch.randperm(d.k, generator=generator)], group_of, d.group_size)


def _group_index(gather: ChannelGather, k: int) -> torch.Tensor:
    assert gather.order is not None
    index = torch.zeros(k, dtype=torch.int32)
    real = gather.order >= 0
    groups = gather.group_of.repeat_interleave(gather.group_size)
    index[gather.order[real].long()] = groups[real].to(torch.int32)
    return index
