# SPDX-License-Identifier: Apache-2.0
"""A case of the conformance kit, as a value: its name, and the scheme of its checkpoint."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    ScaleSpec,
    TransformSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import ElementType, dtype_name
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

ORDERS = ("plain", "cut", "act", "ragged")
DATA = ("random", "signed", "largest", "huge", "tiny", "spread", "dead", "outliers")
_SHORT = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float8_e4m3fn": "e4m3",
    "e8m0": "e8m0",
}
WIDE = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class WeightCase:
    """One weight and the dtypes of its layer.

    ``group``: input channels per scale, −1 one scale per output channel, 0 one for the tensor.
    ``zero``: None, "integer" or "float". ``order``: assignment of channels to groups: "plain" k //
    group; "cut" the same, but this rank begins in the middle of a group; "act" shuffled; "ragged"
    shuffled, with groups of different sizes. ``data``: "random"; "signed" also negative scales;
    "largest" every code the largest; "huge" and "tiny" scales near the limits of their dtype;
    "spread" scales over many magnitudes in one row; "dead" whole groups that mean zero; "outliers"
    x over 60 binary orders in every group, the largest where all weights are zero.
    ``block_rows``: output channels that share a group's scale. ``row_scale``: None, "tensor" (one
    for each shard) or "channel". ``activation``, ``prescale`` and ``hadamard`` (the block, 0 for
    none): preparation of x. ``output``: static quantization of y.
    """

    element: ElementType
    n: int = 96
    k: int = 128
    group: int = 32
    zero: str | None = None
    scale_dtype: str = "bfloat16"
    input_dtype: str = "bfloat16"
    output_dtype: str = ""
    bias_dtype: str | None = None
    order: str = "plain"
    data: str = "random"
    shards: tuple[int, ...] = ()
    block_rows: int = 1
    row_scale: str | None = None
    activation: ActivationSpec | None = None
    prescale: bool = False
    hadamard: int = 0
    output: ActivationSpec | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS or self.data not in DATA:
            raise ValueError(f"case with order {self.order!r} and data {self.data!r}")
        if not self.output_dtype:
            object.__setattr__(self, "output_dtype", self.input_dtype)
        if not self.shards:
            object.__setattr__(self, "shards", (self.n,))

    def __str__(self) -> str:
        parts = [str(self.element)]
        if self.element.kind != "dense":
            group = {-1: "channel", 0: "tensor"}.get(self.group, f"g{self.group}")
            group += f"x{self.block_rows}" if self.block_rows > 1 else ""
            parts += [group, _SHORT[self.scale_dtype] + "scale"]
        parts += [f"{self.row_scale}rowscale"] if self.row_scale else []
        parts += [f"{self.zero}zero"] if self.zero else []
        parts.append("+".join(map(str, self.shards)) + f"x{self.k}")
        parts.append(f"{_SHORT[self.input_dtype]}-{_SHORT[self.output_dtype]}")
        parts += [f"bias{_SHORT[self.bias_dtype]}"] if self.bias_dtype else []
        parts += [self.order] if self.order != "plain" else []
        parts += [self.data] if self.data != "random" else []
        parts += ["prescale"] if self.prescale else []
        parts += [f"hadamard{self.hadamard}"] if self.hadamard else []
        parts += [f"x as {self.activation}"] if self.activation else []
        parts += [f"y as {self.output}"] if self.output else []
        return "-".join(parts)


def outlying(k: int) -> torch.Tensor:
    """Which of ``k`` input channels have the largest x of "outliers": bool [K]."""
    return torch.arange(k) % 32 == 5


def offsets(case: WeightCase) -> list[tuple[int, int]]:
    """(first output channel, number of output channels) of each shard."""
    return list(zip(itertools.accumulate((0, *case.shards)), case.shards, strict=False))


def weight_spec(case: WeightCase) -> WeightSpec:
    """The weight of ``case`` as its checkpoint describes it."""
    if case.element.kind == "dense":
        return WeightSpec(case.element)
    granularity = {-1: "channel", 0: "tensor"}.get(case.group, "group")
    granularity = "block" if case.block_rows > 1 else granularity
    group = case.group if case.group > 0 else -1
    scale = ScaleSpec(case.scale_dtype, granularity, group, case.block_rows)
    zero = None
    if case.zero is not None:
        zero = ZeroSpec(case.zero, "uint8" if case.zero == "integer" else case.scale_dtype)
    return WeightSpec(case.element, scale, zero, "float32" if case.row_scale else None)


def checkpoint_scheme(case: WeightCase, spec: WeightSpec) -> CheckpointScheme:
    """Tensors that the checkpoint of ``case`` has."""
    bits = case.element.bits
    if spec.scale is None:
        dtype = dtype_name(case.element.dense_dtype)
        return CheckpointScheme(spec, (StoredTensor("weight", Role.CODES, dtype, ("N", "K")),))
    scale_axes: tuple[str | int, ...] = ("B" if case.block_rows > 1 else "N", "G")
    scale_axes = (1,) if case.group == 0 else scale_axes
    tensors = [
        StoredTensor("codes", Role.CODES, "int32", ("N", "K"), Packing(bits)),
        StoredTensor("scale", Role.SCALE, case.scale_dtype, scale_axes),
    ]
    if spec.zero is not None:
        packing = Packing(bits, "N") if case.zero == "integer" else None
        dtype = "int32" if packing else case.scale_dtype
        tensors.append(StoredTensor("zero", Role.ZERO, dtype, ("N", "G"), packing))
    if case.order in ("act", "ragged"):
        tensors.append(StoredTensor("g_idx", Role.GROUP_INDEX, "int32", ("K",)))
    if case.row_scale is not None:
        axes = (1,) if case.row_scale == "tensor" else ("N",)
        tensors.append(StoredTensor("row_scale", Role.ROW_SCALE, "float32", axes))
    activation = case.activation
    if activation is not None and activation.needs_scale:
        tensors.append(StoredTensor("input_scale", Role.INPUT_SCALE, "float32", (1,)))
    if activation is not None and activation.needs_zero:
        tensors.append(StoredTensor("input_zero", Role.INPUT_ZERO, "int32", (1,)))
    if case.prescale:
        tensors.append(StoredTensor("prescale", Role.PRESCALE, "float32", ("K",)))
    transform = TransformSpec("hadamard", "input", case.hadamard) if case.hadamard else None
    if case.output is not None:
        tensors.append(StoredTensor("output_scale", Role.OUTPUT_SCALE, "float32", (1,)))
        if case.output.needs_zero:
            tensors.append(StoredTensor("output_zero", Role.OUTPUT_ZERO, "int32", (1,)))
    return CheckpointScheme(
        spec, tuple(tensors), activation, transform, output_activation=case.output
    )
