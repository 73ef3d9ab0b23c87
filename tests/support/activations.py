# SPDX-License-Identifier: Apache-2.0
"""Specs of quantized activations, and numbers to quantize."""

from __future__ import annotations

import torch

from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import INT8

TOKEN = ActivationSpec(INT8, True, "token")
STATIC = ActivationSpec(INT8, False, "tensor")


def tokens(rows: int = 64, k: int = 256, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers of many sizes: outlying channels, small and large tokens, zeros, one-sided tokens."""
    generator = torch.Generator().manual_seed(rows + k)
    x = torch.randn(rows, k, generator=generator)
    x[:, ::17] *= 30
    x *= torch.exp2(torch.randint(-20, 12, (rows, 1), generator=generator).float())
    x[1] = 0
    x[2] = x[2].abs()
    x[3] = -x[3].abs()
    x[4:8, : k // 2] = 0
    return x.to(dtype)
