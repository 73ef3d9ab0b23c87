# SPDX-License-Identifier: Apache-2.0
"""Dequantise in chunks of rows, then multiply in fp32: slow, exact, able to do everything."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vllm.compressed_linear import numerics
from vllm.compressed_linear.backend import Capabilities, QuantLinearMethod
from vllm.compressed_linear.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.numerics import torch_dtype
from vllm.compressed_linear.platform import Platform
from vllm.compressed_linear.weights import CompressedWeights, to_standard_layout

CHUNK_ELEMENTS = 4 << 20

_calls = 0


def calls() -> int:
    """How often the reference op has run in this process."""
    return _calls


def reset_calls() -> None:
    global _calls
    _calls = 0


@torch.library.custom_op("compressed_linear::reference_linear", mutates_args=())
def reference_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """x [M, K] → [M, N]. ``table``: fp32 value of each code, empty for dense weights."""
    global _calls
    _calls += 1
    wide = x.to(torch.float32)
    if order is not None:
        wide = wide.index_select(1, order.clamp(min=0).to(torch.int64))
        wide = wide.masked_fill(order < 0, 0.0)
    n = codes.shape[0]
    out = torch.empty(x.shape[0], n, dtype=torch.float32, device=x.device)
    step = max(CHUNK_ELEMENTS // max(codes.shape[1], 1), 1)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        part = codes[rows]
        values = table[part.to(torch.int64)] if table.numel() else part.to(torch.float32)
        if scale is not None:
            values = values.unflatten(1, (scale.shape[1], -1))
            if zero is not None:
                values = values - zero[rows].to(torch.float32).unsqueeze(-1)
            values = (values * scale[rows].to(torch.float32).unsqueeze(-1)).flatten(1)
        out[:, rows] = wide @ values.t()
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(output_dtype)


@reference_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=output_dtype)


class ReferenceBackend(QuantLinearMethod):
    """Runs any descriptor whose activations are not quantised, on any device."""

    name = "reference"
    capabilities = Capabilities(
        devices=frozenset({"cpu", "cuda", "rocm", "xpu"}),
        integer_bits=frozenset(range(1, 9)),
        other_elements=frozenset(
            e.name
            for e in (
                numerics.BF16,
                numerics.FP16,
                numerics.FP32,
                numerics.E4M3,
                numerics.E5M2,
                numerics.E3M2,
                numerics.E2M3,
                numerics.E2M1,
            )
        ),
        codebooks=True,
        zero_kinds=frozenset({"integer", "float"}),
        channel_order=True,
        padded_order=True,
    )

    @classmethod
    def cost(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> float:
        # One byte of codes in, 4 bytes of fp32 out and in again, per weight.
        return 16.0 * descriptor.n * descriptor.k

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
        return total + (0 if dense else torch.float32.itemsize << weight.element.bits)

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        standard = to_standard_layout(self.descriptor, weights)
        tensors = {"codes": standard.codes}
        if standard.scale is not None:
            tensors["scale"] = standard.scale.contiguous()
        if standard.zero is not None:
            tensors["zero"] = standard.zero.contiguous()
        if weights.permutation is not None:
            tensors["order"] = weights.permutation
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
        out = torch.ops.compressed_linear.reference_linear(
            x.reshape(-1, x.shape[-1]),
            tensors["codes"],
            tensors.get("scale"),
            tensors.get("zero"),
            tensors.get("order"),
            bias,
            tensors["table"],
            torch_dtype(self.descriptor.output_dtype),
        )
        return out.reshape(*x.shape[:-1], self.descriptor.out_features)
