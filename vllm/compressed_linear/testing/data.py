# SPDX-License-Identifier: Apache-2.0
"""Random numbers of a case: codes, scales, zero points, orders, numbers for x.

The caller's generator is seeded with the case's name, so the order of draws must not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.spec.descriptor import WeightSpec
from vllm.compressed_linear.spec.elements import dtype_name, torch_dtype
from vllm.compressed_linear.spec.scheme import StandardWeights
from vllm.compressed_linear.testing.case import (
    WeightCase,
    checkpoint_scheme,
    offsets,
    outlying,
    weight_spec,
)


@dataclass(frozen=True)
class WeightData:
    """Numbers of the whole weight [N, K], of which this rank has the channels from ``start`` on.

    ``standard``: in the checkpoint's channel order. ``group_index``: int64 [K]. ``row_scale``: fp32
    [N] or None. ``input_numbers``: the checkpoint's numbers for x, and for y, by name.
    """

    spec: WeightSpec
    start: int
    standard: StandardWeights
    group_index: torch.Tensor
    row_scale: torch.Tensor | None
    input_numbers: dict[str, torch.Tensor | None]


def draw(case: WeightCase, generator: torch.Generator) -> WeightData:
    """Draw the numbers of ``case``."""
    start = case.group // 2 if case.order == "cut" else 0
    full_k = case.k + start
    spec = weight_spec(case)
    index = _group_index(case, spec, full_k, generator)
    standard = _values(case, spec, full_k, spec.groups(full_k), index, generator)
    row_scale = _row_scale(case, generator)
    return WeightData(
        spec, start, standard, index, row_scale, _input_numbers(case, full_k, generator)
    )


def load_shards(case: WeightCase, data: WeightData, device: torch.device) -> list[LoadedShard]:
    """Store ``data`` as a checkpoint holds it, and load this rank's part of each shard."""
    scheme = checkpoint_scheme(case, data.spec)
    full_k = len(data.group_index)
    loaded = []
    for number, (offset, width) in enumerate(offsets(case)):
        rows = slice(offset, offset + width)
        standard = data.standard
        part = StandardWeights(
            standard.codes[rows],
            None if standard.scale is None else standard.scale[rows],
            None if standard.zero is None else standard.zero[rows],
        )
        source = ShardSource(
            f"{case}.{number}", scheme, width, full_k, 0, width, data.start, full_k - data.start
        )
        second = None if data.row_scale is None else data.row_scale[rows]
        tensors = from_standard_layout(
            scheme, part, data.group_index, row_scale=second, **data.input_numbers
        )
        loaded.append(load_shard(source, tensors, device))
    return loaded


def load_shard(
    source: ShardSource, tensors: dict[str, torch.Tensor], device: torch.device | str = "cpu"
) -> LoadedShard:
    """Slice whole checkpoint tensors for this rank (in a model, CheckpointParameter does)."""
    kept = {}
    for stored in source.scheme.tensors:
        if stored.name not in tensors:
            continue
        tensor = tensors[stored.name]
        for dim, part in enumerate(source.slices(stored, stored.packing)):
            if part is not None:
                tensor = tensor.narrow(dim, part.first, part.count)
        kept[stored.name] = tensor.contiguous().to(device)
    return LoadedShard(source, kept)


def _group_index(
    case: WeightCase, spec: WeightSpec, full_k: int, generator: torch.Generator
) -> torch.Tensor:
    plain = torch.arange(full_k) // spec.group_size(full_k)
    if case.order == "act":
        return plain[torch.randperm(full_k, generator=generator)]
    if case.order == "ragged":
        return torch.randint(spec.groups(full_k), (full_k,), generator=generator)
    return plain


def _values(
    case: WeightCase,
    spec: WeightSpec,
    full_k: int,
    groups: int,
    index: torch.Tensor,
    generator: torch.Generator,
) -> StandardWeights:
    element = case.element
    shape, scales = (case.n, full_k), (case.n, groups)
    if spec.scale is None:
        values = torch.randn(shape, generator=generator) * _scales(case, (case.n, 1), generator)
        return StandardWeights(values.to(element.dense_dtype), None, None)
    count = 1 << element.bits
    codes = torch.randint(count, shape, generator=generator, dtype=torch.uint8)
    if case.data == "largest":
        # For integers the last code; the last one of E4M3 is NaN.
        values = torch.nan_to_num(element.table(), nan=0, posinf=0, neginf=0)
        codes = torch.full(shape, int(values.argmax()), dtype=torch.uint8)
    if element.kind != "integer":
        # No codes of infinities and NaN.
        finite = torch.isfinite(element.table())
        codes = codes.masked_fill(~finite[codes.long()], 0)
    scale = _scales(case, (1, 1) if case.group == 0 else scales, generator)
    scale = _stored_scale(scale, case.scale_dtype).expand(scales).clone()
    # The first row of each row's block; every shard begins with one.
    firsts = [
        offset + row - row % case.block_rows
        for offset, width in offsets(case)
        for row in range(width)
    ]
    scale = scale[firsts]
    zero = None
    if case.zero == "integer":
        zero = torch.randint(count, scales, generator=generator, dtype=torch.uint8)
    elif case.zero == "float":
        zero = (torch.rand(scales, generator=generator) * (count - 1)).to(scale.dtype)
    middle = 0 if element.kind != "integer" else element.bias
    blank = torch.full(scales, middle) if zero is None else zero.to(torch.int64)
    if case.data == "outliers":
        codes = torch.where(outlying(full_k), blank[:, index].to(torch.uint8), codes)
    if case.data == "dead":
        dead = (torch.rand(scales, generator=generator) < 0.5)[firsts]
        if zero is not None:
            zero = torch.where(dead, blank.to(zero.dtype), zero)
        codes = torch.where(dead[:, index], blank[:, index].to(torch.uint8), codes)
        if case.scale_dtype != "e8m0":
            scale = torch.where(dead, torch.zeros((), dtype=scale.dtype), scale)
    return StandardWeights(codes, scale, zero)


def _row_scale(case: WeightCase, generator: torch.Generator) -> torch.Tensor | None:
    """Second-level scales, fp32 [N]."""
    if case.row_scale is None:
        return None
    scale = torch.exp(torch.randn(case.n, generator=generator).clamp(-3, 3)) * 0.1
    if case.row_scale == "tensor":
        scale = scale[[offset for offset, width in offsets(case) for _ in range(width)]]
    return scale


def _input_numbers(
    case: WeightCase, full_k: int, generator: torch.Generator
) -> dict[str, torch.Tensor | None]:
    """The checkpoint's numbers for x: scales under which some of the largest x saturate."""
    numbers: dict[str, torch.Tensor | None] = {}
    activation = case.activation
    if activation is not None and activation.needs_scale:
        reach = activation.maximum * (448 if activation.scale_dtype == "float8_e4m3fn" else 1)
        # Near the dynamic scales, with few bits, so that some x are ties.
        numbers["input_scale"] = torch.tensor([60 / reach]).to(torch.bfloat16).float()
    if activation is not None and activation.needs_zero:
        numbers["input_zero"] = torch.tensor([-(1 << (activation.element.bits - 3)) - 1])
    if case.prescale:
        numbers["prescale"] = torch.exp(torch.randn(full_k, generator=generator) * 0.5)
    if case.output is not None:
        numbers["output_scale"] = torch.tensor([2.0**-4])
        if case.output.needs_zero:
            numbers["output_zero"] = torch.tensor([-7])
    return numbers


def _stored_scale(scale: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype != "e8m0":
        return scale.to(torch_dtype(dtype))
    return (torch.log2(scale.abs()).round() + 127).clamp(0, 254).to(torch.uint8)


def _scales(case: WeightCase, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """fp32 scales that the case's dtypes can hold."""
    dtype = (
        case.element.dense_dtype if case.element.kind == "dense" else torch_dtype(case.scale_dtype)
    )
    narrow = "float16" in (case.input_dtype, case.output_dtype, dtype_name(dtype))
    scale = torch.exp(torch.randn(shape, generator=generator).clamp(-3, 3)) * 0.01
    if dtype is torch.float8_e4m3fn:
        return _e4m3_scales(case, scale * 100, generator)
    if case.data == "signed":
        scale = scale * torch.where(torch.rand(shape, generator=generator) < 0.5, -1, 1)
    elif case.data == "huge":
        scale = 2.0 ** (torch.rand(shape, generator=generator) * 4 + (11 if narrow else 90))
    elif case.data == "tiny":
        # fp16 scales are subnormal, some with only a bit or two. Scales of other dtypes keep
        # products normal: the contract lets kernels flush fp32 denormals.
        dtype = torch.float32 if dtype is torch.uint8 else dtype
        smallest = torch.finfo(dtype).smallest_normal * (1 if dtype is torch.float16 else 2.0**20)
        scale = smallest * (0.02 + 0.9 * torch.rand(shape, generator=generator))
    elif case.data == "spread":
        reach = 12 if narrow else 40
        scale = 2.0 ** ((torch.rand(shape, generator=generator) - 1) * reach)
    return scale


def _e4m3_scales(case: WeightCase, scale: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same kinds of data for a dtype whose smallest number is 2⁻⁹ and whose largest is 448.

    ``scale``: random ones near 1.
    """
    draw = torch.rand(scale.shape, generator=generator)
    if case.data == "signed":
        return scale * torch.where(draw < 0.5, -1, 1)
    exponents = {"huge": 5 + 3.8 * draw, "tiny": -9 + 4 * draw, "spread": -9 + 17.8 * draw}
    return torch.exp2(exponents[case.data]) if case.data in exponents else scale
