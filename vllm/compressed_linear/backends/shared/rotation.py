# SPDX-License-Identifier: Apache-2.0
"""Rotation of a layer's input, before a product that has none."""

from __future__ import annotations

import torch

from vllm.compressed_linear.spec.activation import hadamard


@torch.library.custom_op("compressed_linear::rotate_input", mutates_args=())
def rotate_input(x: torch.Tensor, block: int) -> torch.Tensor:
    """x [M, K] → ``activation.hadamard``, fp32. An op, so that sums stay in its order."""
    return hadamard(x.to(torch.float32, copy=True), block)


@rotate_input.register_fake
def _(x: torch.Tensor, block: int) -> torch.Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def rotated(x: torch.Tensor, block: int) -> torch.Tensor:
    """x [..., K] in blocks of ``block`` channels, fp32; x itself if ``block`` is 0."""
    if not block:
        return x
    out: torch.Tensor = torch.ops.compressed_linear.rotate_input(x.reshape(-1, x.shape[-1]), block)
    return out.reshape(x.shape)
