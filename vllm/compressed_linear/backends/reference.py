# SPDX-License-Identifier: Apache-2.0
"""Reference backend: dequantize chunks of rows and multiply in fp32. Slow, for all descriptors."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping

import torch

from vllm.compressed_linear.backends.base import Capabilities, QuantLinearMethod
from vllm.compressed_linear.backends.shared.call_counter import CallCounter
from vllm.compressed_linear.backends.shared.outputs import output_tensors, output_text, with_output
from vllm.compressed_linear.checkpoint.weights import CompressedWeights, to_standard_layout
from vllm.compressed_linear.machine.cost import roofline
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.activation import prepare_input
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    CompressedLinearDescriptor,
    activation_kinds,
)
from vllm.compressed_linear.spec.elements import torch_dtype, widen_scale

CHUNK_ELEMENTS = 4 << 20

CALLS = CallCounter()


def _dequantized(
    rows: slice | torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    table: torch.Tensor,
) -> torch.Tensor:
    """``rows`` of ŵ before the second-level scale, fp32 [rows, K]."""
    part = codes[rows]
    values = table[part.to(torch.int64)] if table.numel() else part.to(torch.float32)
    if scale is None:
        return values
    values = values.unflatten(1, (scale.shape[1], -1))
    if zero is not None:
        values = values - zero[rows].to(torch.float32).unsqueeze(-1)
    return (values * widen_scale(scale[rows]).unsqueeze(-1)).flatten(1)


@torch.library.custom_op("compressed_linear::reference_linear", mutates_args=())
def reference_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    order: torch.Tensor | None,
    prescale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    activation: str,
    hadamard_block: int,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """x [M, K] → [M, N]. ``table``: fp32 value of each code, empty for dense weights.
    ``activation``: an ActivationSpec as JSON, or "". ``hadamard_block``: 0 for no transform.
    Quantization is part of the op because compilers may not use IEEE division."""
    CALLS.add()
    taken = prepare_input(
        x,
        _activation(activation),
        hadamard_block=hadamard_block,
        order=order,
        prescale=prescale,
        input_scale=input_scale,
        input_zero=input_zero,
    )
    n = codes.shape[0]
    out = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
    step = max(CHUNK_ELEMENTS // max(codes.shape[1], 1), 1)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        out[:, rows] = taken @ _dequantized(rows, codes, scale, zero, table).t()
    if row_scale is not None:
        out *= row_scale
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(output_dtype)


@functools.cache
def _activation(text: str) -> ActivationSpec | None:
    return ActivationSpec.from_json(json.loads(text)) if text else None


@reference_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    order: torch.Tensor | None,
    prescale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    activation: str,
    hadamard_block: int,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=output_dtype)


@torch.library.custom_op("compressed_linear::reference_embedding", mutates_args=())
def reference_embedding(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    order: torch.Tensor | None,
    table: torch.Tensor,
    channels: int,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """ids [M] → rows of ŵ [M, channels] in the order of x's channels. ``table``: as above."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < codes.shape[0]:
        raise ValueError(
            f"compressed_linear::reference_embedding: ids run from {int(ids.min())} to "
            f"{int(ids.max())}, expected 0 to {codes.shape[0] - 1}"
        )
    rows = _dequantized(ids, codes, scale, zero, table)
    if row_scale is not None:
        rows *= row_scale[ids].unsqueeze(-1)
    if order is not None:
        kept = order >= 0
        out = rows.new_zeros(len(ids), channels)
        rows = out.index_add_(1, order[kept].to(torch.int64), rows[:, kept])
    return rows.to(output_dtype)


@reference_embedding.register_fake
def _(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    order: torch.Tensor | None,
    table: torch.Tensor,
    channels: int,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty(ids.shape[0], channels, dtype=output_dtype)


class ReferenceBackend(QuantLinearMethod):
    """Runs any descriptor, on any device."""

    name = "reference"
    capabilities = Capabilities(
        devices=frozenset({"cpu", "cuda", "rocm", "xpu"}),
        integer_bits=frozenset(range(1, 9)),
        other_elements=frozenset(element.name for element in elements.ALL_FLOATS),
        codebooks=True,
        scale_dtypes=frozenset({"bfloat16", "float16", "float32", "float8_e4m3fn", "e8m0"}),
        zero_kinds=frozenset({"integer", "float"}),
        channel_order=True,
        padded_order=True,
        row_scale=True,
        activations=activation_kinds(),
        prescale=True,
        transforms=True,
        outputs=True,
        lookup=True,
    )

    def __init__(self, descriptor: CompressedLinearDescriptor) -> None:
        super().__init__(descriptor)
        self.activation = "" if descriptor.activation is None else descriptor.activation.text
        self.output = output_text(descriptor.output_activation)

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        weights = descriptor.n * descriptor.k
        # Read one byte of codes; write and read fp32 twice while dequantizing and multiplying.
        return roofline(
            platform,
            read_bytes=0.0,
            operations=2.0 * m * weights,
            arithmetic="fp32",
            decode_seconds=17.0 * weights / platform.limits.read,
        )

    @classmethod
    def hardware_tested(cls, platform: Platform, variant: str = "") -> bool:
        return platform.device == "cpu"

    @classmethod
    def prepared_bytes(cls, descriptor: CompressedLinearDescriptor) -> int | None:
        d, weight = descriptor, descriptor.weight
        dense = weight.element.kind == "dense"
        total = d.n * d.k * (weight.element.dense_dtype.itemsize if dense else 1)
        for spec in (weight.scale, weight.zero):
            if spec is not None:
                total += d.n * d.groups * torch_dtype(spec.dtype).itemsize
        if d.channel_order is not None:
            total += d.k * torch.int32.itemsize
        if weight.row_scale is not None:
            total += d.n * torch.float32.itemsize
        if d.prescale is not None:
            total += d.k * torch.float32.itemsize
        if d.activation is not None:
            total += torch.float32.itemsize * d.activation.needs_scale
            total += torch.int32.itemsize * d.activation.needs_zero
        if d.output_activation is not None:
            total += torch.float32.itemsize + torch.int32.itemsize * d.output_activation.needs_zero
        return total + (0 if dense else torch.float32.itemsize << weight.element.bits)

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        standard = to_standard_layout(self.descriptor, weights)
        activation = self.descriptor.activation
        optional = {
            "scale": standard.scale,
            "zero": standard.zero,
            "order": weights.permutation,
            "row_scale": weights.row_scale,
            "prescale": weights.prescale,
            "input_scale": weights.input_scale if activation and activation.needs_scale else None,
            "input_zero": weights.input_zero if activation and activation.needs_zero else None,
        }
        tensors = {name: t.contiguous() for name, t in optional.items() if t is not None}
        tensors["codes"] = standard.codes
        if (output := self.descriptor.output_activation) is not None:
            tensors |= output_tensors(output, weights)
        element = self.descriptor.weight.element
        tensors["table"] = (torch.empty(0) if element.kind == "dense" else element.table()).to(
            standard.codes.device
        )
        return tensors

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        d = self.descriptor
        out = torch.ops.compressed_linear.reference_linear(
            x.reshape(-1, x.shape[-1]),
            tensors["codes"],
            tensors.get("scale"),
            tensors.get("zero"),
            tensors.get("row_scale"),
            tensors.get("order"),
            tensors.get("prescale"),
            tensors.get("input_scale"),
            tensors.get("input_zero"),
            bias,
            tensors["table"],
            self.activation,
            0 if d.transform is None else d.transform.block,
            torch_dtype(d.output_dtype),
        )
        out = out.reshape(*x.shape[:-1], d.out_features)
        return with_output(out, self.output, tensors)

    def embedding(self, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        out = torch.ops.compressed_linear.reference_embedding(
            ids.reshape(-1),
            tensors["codes"],
            tensors.get("scale"),
            tensors.get("zero"),
            tensors.get("row_scale"),
            tensors.get("order"),
            tensors["table"],
            self.descriptor.in_features,
            torch_dtype(self.descriptor.output_dtype),
        )
        return out.reshape(*ids.shape, self.descriptor.in_features)
