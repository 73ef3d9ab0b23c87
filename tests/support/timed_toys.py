# SPDX-License-Identifier: Apache-2.0
"""Backends that compute right and take the time a test gives them, and how they are tuned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from tests.support.checkpoints import checkpoint
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.commands.tune import tune as tuning
from vllm.compressed_linear.commands.tune.tune import Measuring, tune
from vllm.compressed_linear.integration.preparation import detect_platform
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor

MODEL = "gptqmodel-gptq-w4-g128-sym"


class Toy(ReferenceBackend):
    """Computes as ``reference`` does, in ``per_row`` seconds for each token and output channel of a
    clock that nothing else moves. ``price`` is what it says of itself."""

    per_row: ClassVar[float]
    price: ClassVar[float]
    now: ClassVar[float] = 0.0
    sizes: ClassVar[list[int]] = []

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        return cls.price

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        Toy.now += x.shape[0] * self.descriptor.n * self.per_row
        Toy.sizes.append(self.descriptor.n)
        return super().apply(tensors, x, bias)


class Fast(Toy):
    name = "fast"
    per_row = 1e-6
    price = 2.0


class Slow(Toy):
    """Says that it is the faster one."""

    name = "slow"
    per_row = 3e-6
    price = 1.0


MEASURING = Measuring(budget=0.0, cache_bytes=1 << 16, now=lambda: Toy.now, matrix=16)


def tuned(model: str, output: Path, **options: Any) -> tuning.TuneResult:
    given = {"platform": detect_platform(), "measuring": MEASURING, **options}
    return tune(str(checkpoint(model)), output=output, **given)
