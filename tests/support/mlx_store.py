# SPDX-License-Identifier: Apache-2.0
"""Random weights as MLX stores them (``mlx/ops.cpp``: ``quantize``; ``mlx.core.dequantize`` agrees
with the fixtures), and their configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.support import float_definitions as floats
from tests.support.float_models import Stored

E2M1 = np.array([floats._decoded(c, 2, 1, set(), set()) for c in range(16)])


@dataclass(frozen=True)
class MlxWeight:
    """A ``Store``. ``mode``: "affine", "mxfp4", "mxfp8" or "nvfp4"."""

    mode: str = "affine"
    bits: int = 4
    group: int = 64

    @property
    def config(self) -> dict[str, Any]:
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}

    def __call__(self, module: str, n: int, k: int, generator: torch.Generator) -> Stored:
        codes = torch.randint(0, 1 << self.bits, (n, k), generator=generator).numpy()
        if self.mode == "mxfp8":
            codes = np.where(codes % 128 == 127, 0, codes)  # NaN
        tensors = {"weight": _words(codes, self.bits)}
        shape = (n, k // self.group)
        if self.mode == "affine":
            scale = (torch.rand(shape, generator=generator) * 0.02 + 0.01).to(torch.bfloat16)
            bias = (torch.randn(shape, generator=generator) * 0.1).to(torch.bfloat16)
            tensors |= {"scales": scale, "biases": bias}
            wide, added = (t.to(torch.float64).numpy().repeat(self.group, 1) for t in (scale, bias))
            return Stored(tensors, codes * wide + added)
        if self.mode == "nvfp4":
            small = (torch.rand(shape, generator=generator) * 0.1 + 0.02).to(torch.float8_e4m3fn)
            tensors["scales"] = small.view(torch.uint8)
            factor = small.to(torch.float64).numpy()
        else:
            power = torch.randint(119, 124, shape, generator=generator, dtype=torch.uint8)
            tensors["scales"] = power
            factor = np.exp2(power.numpy().astype(np.float64) - 127)
        values = E2M1[codes] if self.bits == 4 else _e4m3(codes)
        return Stored(tensors, values * factor.repeat(self.group, 1))


def _e4m3(codes: np.ndarray) -> np.ndarray:
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    return table.numpy()[codes]


def _words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """[N, K] → uint32 [N, K·bits/32], one little-endian bit stream for each row."""
    stream = (codes[:, :, None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.reshape(len(codes), -1).astype(np.uint8), 1, bitorder="little")
    return torch.from_numpy(packed.view(np.uint32).copy())
