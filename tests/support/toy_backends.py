# SPDX-License-Identifier: Apache-2.0
"""Backends that declare things and compute nothing, and a descriptor for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vllm.compressed_linear.backends.base import Capabilities, QuantLinearMethod
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import uint

WEIGHT = WeightSpec(uint(4, 8), ScaleSpec("bfloat16", "group", 32))
DESCRIPTOR = CompressedLinearDescriptor(128, 64, WEIGHT, "bfloat16", "bfloat16")
CPU = Platform("cpu")


class Toy(QuantLinearMethod):
    """Declares things and computes nothing."""

    name = "toy"
    price: ClassVar[float] = 1.0
    capabilities = Capabilities(
        devices=frozenset({"cpu"}), integer_bits=frozenset({4}), channel_order=True
    )

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        return cls.price

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        return {}

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        raise NotImplementedError


def toy(name: str, price: float = 1.0, **members: Any) -> type[QuantLinearMethod]:
    return type(f"Toy_{name}", (Toy,), {"name": name, "price": price, **members})
