# SPDX-License-Identifier: Apache-2.0
"""What the conformance kit tries: weights of every kind, and where they come from.

A ``Case`` is a value; ``Case.build`` makes its weights from its name alone, so a failure can be
repeated. Weights take the way of a checkpoint (``from_standard_layout``, then ``refine``), so a
backend is given exactly what it is given in a model.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass, field, replace

import torch

from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.backends.contract import (
    Contract,
    contract_bound,
    weight_magnitude,
)
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    CompressedLinearDescriptor,
    ScaleSpec,
    TransformSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import (
    ElementType,
    dtype_name,
    scale_dtype_name,
    torch_dtype,
    widen_scale,
)
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights, StoredTensor

ORDERS = ("plain", "cut", "act", "ragged")
DATA = ("random", "signed", "largest", "huge", "tiny", "spread", "dead")


@dataclass(frozen=True)
class Case:
    """One weight and the dtypes around it.

    ``group``: input channels per scale, −1 one scale per output channel, 0 one for the tensor.
    ``zero``: None, "integer" or "float". ``order``: how channels belong to groups: "plain" k //
    group; "cut" the same, but this rank begins in the middle of a group; "act" shuffled; "ragged"
    shuffled and of unlike sizes. ``data``: "random"; "signed" also negative scales; "largest" every
    code the largest; "huge" and "tiny" scales near the ends of their dtype; "spread" scales over
    many magnitudes in one row; "dead" whole groups that mean zero. ``block_rows``: output channels
    that share a group's scale. ``row_scale``: None, "tensor" (one for each shard) or "channel".
    ``activation``, ``prescale`` and ``hadamard`` (the block, 0 for none) are what is done to x.
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
        return "-".join(parts)

    def build(self, device: str = "cpu") -> Problem:
        """Make the weights. Same case, same numbers."""
        return _build(self, torch.device(device))


_SHORT = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float8_e4m3fn": "e4m3",
    "e8m0": "e8m0",
}
_WIDE = ("bfloat16", "float16", "float32")


@dataclass
class Problem:
    """A case with its numbers. ``weight`` float64 [N, K] is exact, in the order of x's channels;
    ``magnitude`` float64 [N, K] is what the contract's bound is made of; ``own`` is ``weights``
    once more, for what no backend may spoil."""

    case: Case
    descriptor: CompressedLinearDescriptor
    weights: CompressedWeights
    weight: torch.Tensor
    magnitude: torch.Tensor
    bias: torch.Tensor | None
    own: CompressedWeights = field(repr=False)
    generator: torch.Generator = field(repr=False)

    def activations(self, rows: int) -> torch.Tensor:
        """x [rows, K] in the input dtype: normal numbers, some channels 30 times larger; scaled so
        that no result of "huge" weights overflows. Where x is quantised, tokens differ in size and
        some of their channels are zero."""
        x = torch.randn(rows, self.case.k, generator=self.generator, dtype=torch.float64)
        x[:, ::17] *= 30
        if self.case.data == "largest":
            x = x.abs()
        if self.case.activation is not None:
            sizes = torch.randint(-12, 3, (rows, 1), generator=self.generator, dtype=torch.float64)
            x = x * torch.exp2(sizes.masked_fill(torch.arange(rows).unsqueeze(1) % 2 == 0, 0))
            x[1::3, self.case.k // 3 : self.case.k // 2 + 1] = 0
        if self.case.data == "huge":
            x = x / (self.weight.abs().sum(1).max().cpu() / 100)
        return x.to(torch_dtype(self.case.input_dtype)).to(self.weight.device)

    def taken(self, x: torch.Tensor) -> torch.Tensor:
        """x̂ [M, K], in the order of x's channels."""
        if not (self.case.activation or self.case.prescale or self.case.hadamard):
            return x
        return self.own.in_stored_order(self.own.prepare_input(self.descriptor, x))

    def expected(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """float64 [M, N] for x [M, K]."""
        out = self.taken(x).to(torch.float64) @ self.weight.t()
        return out if bias is None else out + bias.to(torch.float64)

    def bound(
        self, x: torch.Tensor, expected: torch.Tensor, backend: type[QuantLinearMethod]
    ) -> torch.Tensor:
        """float64 [M, N], the largest error that ``backend``'s contract allows."""
        contract = backend.contract(self.descriptor)
        return contract_bound(
            self.taken(x),
            self.magnitude,
            expected,
            self.descriptor.output_dtype,
            contract,
            self._input_error(x, contract),
        )

    def _input_error(self, x: torch.Tensor, contract: Contract) -> torch.Tensor | float:
        own, magnitude = self.own, self.magnitude
        if (order := own.permutation) is not None:
            here = order.clamp(min=0).to(torch.int64)
            magnitude = magnitude.index_select(1, here).masked_fill(order < 0, 0)
        plain = own.prepare_unquantized(self.descriptor, x)
        return contract.input_error(plain, magnitude, own.input_scale, own.input_zero)


def _build(case: Case, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    start = case.group // 2 if case.order == "cut" else 0
    full_k = case.k + start
    spec = _weight_spec(case)
    groups = spec.groups(full_k)
    index = _group_index(case, spec, full_k, generator)
    standard = _values(case, spec, full_k, groups, index, generator)
    row_scale = _row_scale(case, generator)
    numbers = _input_numbers(case, full_k, generator)
    loaded, offset = [], 0
    for number, width in enumerate(case.shards):
        rows = slice(offset, offset + width)
        part = StandardWeights(
            standard.codes[rows],
            None if standard.scale is None else standard.scale[rows],
            None if standard.zero is None else standard.zero[rows],
        )
        scheme = _scheme(case, spec)
        source = ShardSource(
            f"{case}.{number}", scheme, width, full_k, 0, width, start, full_k - start
        )
        second = None if row_scale is None else row_scale[rows]
        tensors = from_standard_layout(scheme, part, index, row_scale=second, **numbers)
        loaded.append(load_shard(source, tensors, device))
        offset += width
    context = LayerContext(case.input_dtype, case.output_dtype, case.bias_dtype)
    parts = refine(loaded, context)
    if len(parts) != 1:
        raise AssertionError(f"case {case} became {len(parts)} parts")
    copies = [
        LoadedShard(shard.source, {name: t.clone() for name, t in shard.tensors.items()})
        for shard in loaded
    ]
    (own,) = refine(copies, context)
    weight, magnitude = _exact(spec, standard, index, row_scale)
    bias = None
    if case.bias_dtype is not None:
        size = 1e-3 if case.data == "tiny" else 1.0
        bias = torch.randn(case.n, generator=generator) * size
        bias = bias.to(torch_dtype(case.bias_dtype)).to(device)
    return Problem(
        case,
        parts[0].descriptor,
        parts[0].weights,
        weight[:, start:].to(device),
        magnitude[:, start:].to(device),
        bias,
        own.weights,
        generator,
    )


def load_shard(
    source: ShardSource, tensors: dict[str, torch.Tensor], device: torch.device | str = "cpu"
) -> LoadedShard:
    """What a rank keeps of whole checkpoint tensors (in a model, CheckpointParameter does this)."""
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


def _weight_spec(case: Case) -> WeightSpec:
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


def _scheme(case: Case, spec: WeightSpec) -> CheckpointScheme:
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
    return CheckpointScheme(spec, tuple(tensors), activation, transform)


def _group_index(
    case: Case, spec: WeightSpec, full_k: int, generator: torch.Generator
) -> torch.Tensor:
    plain = torch.arange(full_k) // spec.group_size(full_k)
    if case.order == "act":
        return plain[torch.randperm(full_k, generator=generator)]
    if case.order == "ragged":
        return torch.randint(spec.groups(full_k), (full_k,), generator=generator)
    return plain


def _values(
    case: Case,
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
        # Of integers that is the last; of e4m3 the last is NaN.
        values = torch.nan_to_num(element.table(), nan=0, posinf=0, neginf=0)
        codes = torch.full(shape, int(values.argmax()), dtype=torch.uint8)
    if element.kind != "integer":
        # Codes of infinities and NaN are no weights.
        finite = torch.isfinite(element.table())
        codes = codes.masked_fill(~finite[codes.long()], 0)
    scale = _scales(case, (1, 1) if case.group == 0 else scales, generator)
    scale = _stored_scale(scale, case.scale_dtype).expand(scales).clone()
    # The first row of each row's block; every shard begins with one.
    firsts = [
        offset + row - row % case.block_rows
        for offset, width in _offsets(case)
        for row in range(width)
    ]
    scale = scale[firsts]
    zero = None
    if case.zero == "integer":
        zero = torch.randint(count, scales, generator=generator, dtype=torch.uint8)
    elif case.zero == "float":
        zero = (torch.rand(scales, generator=generator) * (count - 1)).to(scale.dtype)
    if case.data == "dead":
        dead = (torch.rand(scales, generator=generator) < 0.5)[firsts]
        middle = 0 if element.kind != "integer" else element.bias
        blank = torch.full(scales, middle) if zero is None else zero.to(torch.int64)
        if zero is not None:
            zero = torch.where(dead, blank.to(zero.dtype), zero)
        codes = torch.where(dead[:, index], blank[:, index].to(torch.uint8), codes)
        if case.scale_dtype != "e8m0":
            scale = torch.where(dead, torch.zeros((), dtype=scale.dtype), scale)
    return StandardWeights(codes, scale, zero)


def _offsets(case: Case) -> list[tuple[int, int]]:
    """(first output channel, number of them) of each shard."""
    return list(zip(itertools.accumulate((0, *case.shards)), case.shards, strict=False))


def _row_scale(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    """fp32 [N]."""
    if case.row_scale is None:
        return None
    scale = torch.exp(torch.randn(case.n, generator=generator).clamp(-3, 3)) * 0.1
    if case.row_scale == "tensor":
        scale = scale[[offset for offset, width in _offsets(case) for _ in range(width)]]
    return scale


def _input_numbers(
    case: Case, full_k: int, generator: torch.Generator
) -> dict[str, torch.Tensor | None]:
    """What the checkpoint says of x: scales under which some of the largest x saturate."""
    numbers: dict[str, torch.Tensor | None] = {}
    activation = case.activation
    if activation is not None and activation.needs_scale:
        reach = activation.maximum * (448 if activation.scale_dtype == "float8_e4m3fn" else 1)
        # Near what dynamic scales would be, with few bits, so that some x lie between two codes.
        numbers["input_scale"] = torch.tensor([60 / reach]).to(torch.bfloat16).float()
    if activation is not None and activation.needs_zero:
        numbers["input_zero"] = torch.tensor([-(1 << (activation.element.bits - 3)) - 1])
    if case.prescale:
        numbers["prescale"] = torch.exp(torch.randn(full_k, generator=generator) * 0.5)
    return numbers


def _stored_scale(scale: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype != "e8m0":
        return scale.to(torch_dtype(dtype))
    return (torch.log2(scale.abs()).round() + 127).clamp(0, 254).to(torch.uint8)


def _scales(case: Case, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
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
        # fp16 scales become subnormal, with a bit or two left of some. The others are taken from
        # where products are normal numbers still: the contract lets kernels flush fp32 denormals.
        dtype = torch.float32 if dtype is torch.uint8 else dtype
        smallest = torch.finfo(dtype).smallest_normal * (1 if dtype is torch.float16 else 2.0**20)
        scale = smallest * (0.02 + 0.9 * torch.rand(shape, generator=generator))
    elif case.data == "spread":
        reach = 12 if narrow else 40
        scale = 2.0 ** ((torch.rand(shape, generator=generator) - 1) * reach)
    return scale


def _e4m3_scales(case: Case, scale: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same kinds of data for a dtype of which 2⁻⁹ is the smallest number and 448 the largest.

    ``scale``: random ones near 1.
    """
    draw = torch.rand(scale.shape, generator=generator)
    if case.data == "signed":
        return scale * torch.where(draw < 0.5, -1, 1)
    exponents = {"huge": 5 + 3.8 * draw, "tiny": -9 + 4 * draw, "spread": -9 + 17.8 * draw}
    return torch.exp2(exponents[case.data]) if case.data in exponents else scale


def _exact(
    spec: WeightSpec,
    standard: StandardWeights,
    index: torch.Tensor,
    row_scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ŵ, magnitude) float64 [N, K], straight from what was stored; shares nothing with refine."""
    element = spec.element
    values = element.decode(standard.codes).to(torch.float64)
    second = 1 if row_scale is None else row_scale.to(torch.float64).unsqueeze(1)
    if standard.scale is None:
        return values * second, (values * second).abs()
    scale = standard.scale[:, index]
    zero = None if standard.zero is None else standard.zero[:, index]
    if zero is not None:
        values = values - zero.to(torch.float64)
    plain = CompressedLinearDescriptor(
        values.shape[1],
        values.shape[0],
        replace(spec, scale=ScaleSpec(scale_dtype_name(scale.dtype), "group", 1)),
        "float32",
        "float32",
    )
    magnitude = weight_magnitude(plain, standard.codes, scale, zero, row_scale)
    exact = values * widen_scale(scale).to(torch.float64) * second
    return exact, magnitude.to(torch.float64)
