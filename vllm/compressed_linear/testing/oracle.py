# SPDX-License-Identifier: Apache-2.0
"""Weights, exact results and largest errors of a case.

``Case.build`` makes the weights from the case's name alone, so failures are reproducible. Weights
are stored and loaded as those of a checkpoint (``from_standard_layout``, then ``refine``), so a
backend gets the same input as in a model.
"""

from __future__ import annotations

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
from vllm.compressed_linear.checkpoint.shard import LoadedShard
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.activation import quantize_dequantize
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, ScaleSpec
from vllm.compressed_linear.spec.elements import scale_dtype_name, torch_dtype, widen_scale
from vllm.compressed_linear.testing.case import WeightCase, outlying
from vllm.compressed_linear.testing.data import WeightData, draw, load_shards


@dataclass(frozen=True)
class Case(WeightCase):
    """A ``WeightCase`` that can be built; for its fields see there."""

    def build(self, device: str = "cpu") -> Problem:
        """Make the weights. Equal cases give equal numbers."""
        return _build(self, torch.device(device))


@dataclass
class Problem:
    """A case with its numbers. ``weight`` float64 [N, K] is exact, in the order of x's channels;
    ``magnitude`` float64 [N, K] is that of ``contract_bound``; ``own``: a copy of ``weights`` that
    no backend gets, for the expected results."""

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
        that no result of "huge" weights overflows; for "outliers" of many magnitudes, zeros and
        denormals among them. If x is quantized, tokens differ in magnitude
        and some of their channels are zero."""
        x = torch.randn(rows, self.case.k, generator=self.generator, dtype=torch.float64)
        x[:, ::17] *= 30
        if self.case.data == "largest":
            x = x.abs()
        if self.case.data == "outliers":
            orders = torch.rand(x.shape, generator=self.generator, dtype=torch.float64) * 60
            x = x * torch.exp2(-orders)
            x[:, 3::7] *= 0.0  # of both signs
            x[:, 2::11] *= 2.0**-100
            x[:, outlying(self.case.k)] = 2.0 ** (10 if self.case.input_dtype == "float16" else 30)
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
        out = out if bias is None else out + bias.to(torch.float64)
        if self.case.output is None:
            return out
        numbers = self.own.output_scale, self.own.output_zero
        rounded = out.to(torch_dtype(self.descriptor.output_dtype)).to(torch.float32)
        return quantize_dequantize(rounded, self.case.output, *numbers).to(torch.float64)

    def bound(
        self, x: torch.Tensor, expected: torch.Tensor, backend: type[QuantLinearMethod]
    ) -> torch.Tensor:
        """float64 [M, N], the largest error that ``backend``'s contract allows."""
        contract = backend.contract(self.descriptor)
        bound = contract_bound(
            self.taken(x),
            self.magnitude,
            expected,
            self.descriptor.output_dtype,
            contract,
            self._input_error(x, contract),
        )
        # Another last bit of y may be another code.
        return bound if self.own.output_scale is None else bound + self.own.output_scale

    def _input_error(self, x: torch.Tensor, contract: Contract) -> torch.Tensor | float:
        if contract.exact_input:
            return 0.0
        own, magnitude = self.own, self.magnitude
        if (order := own.permutation) is not None:
            here = order.clamp(min=0).to(torch.int64)
            magnitude = magnitude.index_select(1, here).masked_fill(order < 0, 0)
        plain = own.prepare_unquantized(self.descriptor, x)
        return contract.input_error(plain, magnitude, own.input_scale, own.input_zero)


def _build(case: Case, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    data = draw(case, generator)
    loaded = load_shards(case, data, device)
    context = LayerContext(case.input_dtype, case.output_dtype, case.bias_dtype)
    parts = refine(loaded, context)
    if len(parts) != 1:
        raise AssertionError(f"case {case} became {len(parts)} parts")
    copies = [
        LoadedShard(shard.source, {name: t.clone() for name, t in shard.tensors.items()})
        for shard in loaded
    ]
    (own,) = refine(copies, context)
    weight, magnitude = _exact(data)
    bias = None
    if case.bias_dtype is not None:
        size = 1e-3 if case.data == "tiny" else 1.0
        bias = torch.randn(case.n, generator=generator) * size
        bias = bias.to(torch_dtype(case.bias_dtype)).to(device)
    return Problem(
        case,
        parts[0].descriptor,
        parts[0].weights,
        weight[:, data.start :].to(device),
        magnitude[:, data.start :].to(device),
        bias,
        own.weights,
        generator,
    )


def _exact(data: WeightData) -> tuple[torch.Tensor, torch.Tensor]:
    """(ŵ, magnitude) float64 [N, K], from the stored numbers, without code of ``refine``."""
    standard, index, row_scale = data.standard, data.group_index, data.row_scale
    values = data.spec.element.decode(standard.codes).to(torch.float64)
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
        replace(data.spec, scale=ScaleSpec(scale_dtype_name(scale.dtype), "group", 1)),
        "float32",
        "float32",
    )
    magnitude = weight_magnitude(plain, standard.codes, scale, zero, row_scale)
    exact = values * widen_scale(scale).to(torch.float64) * second
    return exact, magnitude.to(torch.float64)
