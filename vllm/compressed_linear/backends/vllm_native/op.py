# SPDX-License-Identifier: Apache-2.0
"""The operator through which vLLM's kernel classes run.

Its arguments are tensors and plain values, so it can be traced, cached and captured in a CUDA
graph: the objects that vLLM's classes need are made from its text arguments, once per process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from vllm.compressed_linear.backends.shared.call_counter import CallCounter
from vllm.compressed_linear.backends.vllm_native.adapter import KernelAdapter
from vllm.compressed_linear.backends.vllm_native.table import by_tag
from vllm.compressed_linear.spec.activation import gather_channels
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype

ORDER = "order"
ROW_SCALE = "row_scale"

CALLS = CallCounter()


def text_of(d: CompressedLinearDescriptor) -> str:
    """The descriptor as an argument of the operator."""
    return json.dumps(d.to_json())


@lru_cache(maxsize=1024)
def ready(tag: str, descriptor: str, device: str) -> tuple[KernelAdapter, Any, dict[str, Any]]:
    """The adapter of ``tag``, an object of its class for ``descriptor``, and the attributes that
    the class reads of a layer."""
    d = CompressedLinearDescriptor.from_json(json.loads(descriptor))
    adapter = by_tag(tag)
    return adapter, adapter.instance(d, device), adapter.attributes(d)


def multiply(
    x: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    order: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    tag: str,
    descriptor: str,
    device: str,
) -> torch.Tensor:
    """x [M, K] → [M, N]: what the operator does. ``tensors``: what the class left on the layer, by
    its own names; ``order`` int32 [k], −1 for a channel of zeros; ``row_scale`` [N] of the dtype of
    the class's result, by which that is multiplied."""
    if order is not None:
        x = gather_channels(x, order)
    adapter, kernel, attributes = ready(tag, descriptor, device)
    layer = SimpleNamespace(**{**attributes, **tensors})
    if adapter.adds_bias:
        return adapter.run(kernel, layer, x.contiguous(), bias)
    out = adapter.run(kernel, layer, x.contiguous(), None)
    if row_scale is not None:
        out = out * row_scale
    return (out if bias is None else out + bias).to(x.dtype)


@torch.library.custom_op("compressed_linear::vllm_native_linear", mutates_args=())
def vllm_native_linear(
    x: torch.Tensor,
    tensors: list[torch.Tensor],
    order: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    names: str,
    tag: str,
    descriptor: str,
    device: str,
    out_features: int,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """x [M, K] → [M, N] by the class of ``tag``; ``names``: of ``tensors``, commas between them."""
    CALLS.add()
    if not x.shape[0]:
        return x.new_empty(0, out_features, dtype=output_dtype)
    named = dict(zip(names.split(","), tensors, strict=True))
    return multiply(x, named, order, row_scale, bias, tag, descriptor, device)


@vllm_native_linear.register_fake
def _(
    x: torch.Tensor,
    tensors: list[torch.Tensor],
    order: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    names: str,
    tag: str,
    descriptor: str,
    device: str,
    out_features: int,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features, dtype=output_dtype)


def call(
    d: CompressedLinearDescriptor,
    text: str,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    bias: torch.Tensor | None,
    device: str,
) -> torch.Tensor:
    """The operator on prepared ``tensors``, whose names begin with the tag of their class.
    ``text``: of ``text_of(d)``, which the compiler cannot trace and no call should wait for."""
    tag = next(name for name in tensors if name not in (ORDER, ROW_SCALE)).partition("_")[0]
    own = {
        name.removeprefix(f"{tag}_"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{tag}_")
    }
    out: torch.Tensor = torch.ops.compressed_linear.vllm_native_linear(
        x.reshape(-1, x.shape[-1]),
        list(own.values()),
        tensors.get(ORDER),
        tensors.get(ROW_SCALE),
        bias,
        ",".join(own),
        tag,
        text,
        device,
        d.n,
        torch_dtype(d.output_dtype),
    )
    return out.reshape(*x.shape[:-1], d.n)
