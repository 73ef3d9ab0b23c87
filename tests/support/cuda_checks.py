# SPDX-License-Identifier: Apache-2.0
"""Checks of what an operator of vLLM's CUDA wheel is given, for doubles of them."""

from __future__ import annotations

import torch


def expect(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(f"an operator of vLLM's CUDA wheel would refuse this: {text}")


def on(device: torch.device, *tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        expect(tensor is None or tensor.device == device, f"a tensor is not on {device}")


def unreal(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"
