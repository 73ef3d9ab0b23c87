# SPDX-License-Identifier: Apache-2.0
"""Weights that are not quantized, on a GPU: the vendor's library, as vLLM's unquantized layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm.compressed_linear.backends.vllm_native.adapter import KernelAdapter, add_parameter
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import dtype_name, torch_dtype


@dataclass(frozen=True, kw_only=True)
class Dense(KernelAdapter):
    """``torch.nn.functional.linear``."""

    family = "dense"

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        stored = dtype_name(d.weight.element.dense_dtype)
        if stored != d.input_dtype:
            yield f"{stored} weights under {d.input_dtype} activations"

    def config(self, d: CompressedLinearDescriptor) -> object:
        return None

    def build(self, kernel: Any, d: CompressedLinearDescriptor) -> Any:
        return None

    def instance(self, d: CompressedLinearDescriptor, device: str) -> Any:
        return None

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        layer = torch.nn.Module()
        codes = [weights.rows(start, stop).codes for start, stop in weights.chunks()]
        add_parameter(layer, "weight", torch.cat(codes))
        return layer

    def repack(self, kernel: Any, layer: torch.nn.Module, d: CompressedLinearDescriptor) -> None:
        """The natural layout is what the library reads."""

    def run(
        self, kernel: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight)

    def prepared_bytes(self, d: CompressedLinearDescriptor) -> int:
        return d.n * d.k * torch_dtype(d.input_dtype).itemsize

    def weight_rounding(self, d: CompressedLinearDescriptor) -> float:
        # Parts of a sum that is split along K may be added in the dtype of the result.
        return float(torch.finfo(torch_dtype(d.input_dtype)).eps / 2)


KERNELS = (
    Dense(
        kernel="torch linear",
        tag="dense",
        devices=frozenset({"cuda", "rocm", "xpu"}),
        efficiency=0.75,
    ),
)
