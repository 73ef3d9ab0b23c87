# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for layouts and whole weights, shared by several test files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from vllm.compressed_linear.spec.descriptor import ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.spec.packing import Packing, ZeroBump
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights, StoredTensor

CONTAINERS = {"int8": 8, "uint8": 8, "int16": 16, "int32": 32, "int64": 64}
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 2: (2,), 4: (4,), 8: (8,)}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@st.composite
def packings(draw: st.DrawFn, bits: int | None = None, axis: str = "K") -> Packing:
    """Any packing: straddling or not, reordered, in bit planes, signed, bumped."""
    if bits is None:
        bits = draw(st.integers(1, 8))
    container = draw(st.sampled_from(sorted(CONTAINERS)))
    width = CONTAINERS[container]
    kind = draw(st.sampled_from(["dense", "not dense", "order", "planes", "signed", "bump"]))
    if kind == "planes" and bits in PLANES:
        return Packing(bits, axis, container, planes=PLANES[bits])
    if kind == "order":
        run = width // bits
        order = tuple(draw(st.permutations(range(run))))
        return Packing(bits, axis, container, dense=width % bits == 0, order=order)
    if kind == "bump":
        whole = width % bits == 0
        bumps = [ZeroBump.FIELD, *([ZeroBump.WORD] if whole else [])]
        return Packing(bits, axis, container, zero_bump=draw(st.sampled_from(bumps)))
    return Packing(bits, axis, container, dense=kind != "not dense", signed=kind == "signed")


@dataclass(frozen=True)
class Weight:
    """A scheme with values for it; ``group_index`` int64 [K] or None."""

    scheme: CheckpointScheme
    standard: StandardWeights
    group_index: torch.Tensor | None

    @property
    def channel_groups(self) -> torch.Tensor:
        """int64 [K]: the group of each channel."""
        k = self.standard.codes.shape[1]
        if self.group_index is not None:
            return self.group_index
        return torch.arange(k) // self.scheme.weight.group_size(k)

    def exact(self) -> torch.Tensor:
        """float64 [N, K], by the definition of a quantized weight."""
        values = self.standard.codes.double() - self.scheme.weight.element.bias
        index = self.channel_groups
        assert self.standard.scale is not None
        if self.standard.zero is not None:
            values = values - self.standard.zero.double()[:, index]
        return values * self.standard.scale.double()[:, index]


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    """Whole weights in any layout: axes either way round, zero points packed along either."""
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 80))
    bits = draw(st.integers(1, 8))
    group = draw(st.sampled_from([-1, 1, 7, 8, 16, 32]))
    zero = draw(st.sampled_from([None, "integer", "float"]))
    scale_dtype = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    reordered = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spec = WeightSpec(
        uint(bits) if zero else uint(bits, 1 << (bits - 1)),
        ScaleSpec(scale_dtype, "channel" if group == -1 else "group", group),
        None if zero is None else ZeroSpec(zero, "uint8" if zero == "integer" else scale_dtype),
    )
    groups = spec.groups(k)
    tensors = [
        StoredTensor(
            "codes",
            Role.CODES,
            "",
            draw(st.sampled_from([("N", "K"), ("K", "N")])),
            draw(packings(bits, draw(st.sampled_from("NK")))),
        ),
        StoredTensor(
            "scale",
            Role.SCALE,
            scale_dtype,
            draw(st.sampled_from([("N", "G"), ("G", "N")])),
            group_multiple=draw(st.sampled_from([1, 4])),
        ),
    ]
    if zero is not None:
        packing = draw(packings(bits, draw(st.sampled_from("NG")))) if zero == "integer" else None
        axes = draw(st.sampled_from([("N", "G"), ("G", "N")]))
        multiple = draw(st.sampled_from([1, 8]))
        tensors.append(
            StoredTensor("zero", Role.ZERO, scale_dtype, axes, packing, group_multiple=multiple)
        )
    index = None
    if reordered:
        tensors.append(StoredTensor("g_idx", Role.GROUP_INDEX, "int32", ("K",)))
        index = torch.randint(groups, (k,), generator=generator)
    points = None
    if zero == "integer":
        points = torch.randint(1 << bits, (n, groups), generator=generator, dtype=torch.uint8)
    elif zero == "float":
        points = torch.rand(n, groups, generator=generator).to(getattr(torch, scale_dtype)) * 3
    scale = torch.rand(n, groups, generator=generator) + 0.01
    return Weight(
        CheckpointScheme(spec, tuple(tensors)),
        StandardWeights(
            torch.randint(1 << bits, (n, k), generator=generator, dtype=torch.uint8),
            scale.to(getattr(torch, scale_dtype)),
            points,
        ),
        index,
    )
