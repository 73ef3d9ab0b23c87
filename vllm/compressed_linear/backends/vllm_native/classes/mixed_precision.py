# SPDX-License-Identifier: Apache-2.0
"""vLLM's mixed-precision kernel classes: integer weights, activations of 16 bits.

They take a configuration without bias, channel order or dtype of scales, answer with the first
reason only, never ask whether their operator was built, and repack the parameters of a layer in
place. Here they are asked axis by axis, and given a light layer of vLLM's own parameter class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch

from vllm.compressed_linear.backends.vllm_native.classes.tables import disabled
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.elements import torch_dtype

CODES, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero_point"
"""Parameter names for vLLM's kernel classes."""


@dataclass(frozen=True)
class KernelRequest:
    """What ``MPLinearLayerConfig`` is made of. ``bias``: code that means 0; ``group_size``: −1 is
    all of K; ``dtype``: name of the activations' dtype."""

    k: int
    n: int
    bits: int
    bias: int
    zero_points: bool
    group_size: int
    dtype: str


def mixed_precision_config(request: KernelRequest) -> Any:
    """vLLM's ``MPLinearLayerConfig`` of ``request``."""
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.scalar_type import ScalarType

    values = {
        "full_weight_shape": (request.k, request.n),
        "partition_weight_shape": (request.k, request.n),
        "weight_type": ScalarType.uint(request.bits, request.bias or None),
        "act_type": torch_dtype(request.dtype),
        "group_size": request.group_size,
        "zero_points": request.zero_points,
        "has_g_idx": False,
    }
    fields = {field.name for field in dataclasses.fields(MPLinearLayerConfig)}
    return MPLinearLayerConfig(**{name: value for name, value in values.items() if name in fields})


def class_reasons(kernel: type, request: KernelRequest) -> list[str]:
    """Every reason why vLLM's class declines ``request`` (empty: it accepts).

    vLLM's answer stops at the first rule that is broken, so each axis is also asked by itself with
    everything else as vLLM likes it best.
    """
    if (unwanted := disabled(kernel)) is not None:
        return [unwanted]
    refusal = _ask(kernel, request)
    if refusal is None:
        return []
    usual = KernelRequest(4096, 4096, 4, 8, False, 128, request.dtype)
    if _ask(kernel, usual) is not None:
        return [refusal]
    asked = [_ask(kernel, variant) for variant in _one_axis_each(request, usual)]
    # The refusal of the whole comes last: it repeats one of the others unless rules interact.
    return list(dict.fromkeys(reason for reason in (*asked, refusal) if reason is not None))


def _one_axis_each(request: KernelRequest, usual: KernelRequest) -> Iterator[KernelRequest]:
    yield replace(usual, bits=request.bits, bias=request.bias, zero_points=request.zero_points)
    if request.group_size > 0:
        yield replace(usual, k=4096 * request.group_size, group_size=request.group_size)
    yield replace(usual, k=request.k, group_size=-1)
    yield replace(usual, n=request.n)


def _ask(kernel: Any, request: KernelRequest) -> str | None:
    try:
        answer = kernel.can_implement(mixed_precision_config(request))
    except Exception as error:  # a check that fails is a refusal, not the end of the selection
        return f"its can_implement failed with {type(error).__name__}: {error}"
    able, reason = answer if isinstance(answer, tuple) else (answer, None)
    return None if able else str(reason or "no reason given")


ROUNDS_X = "vLLM would quantize the activations to 8 bits on this CPU"
"""Begin of what ``quantizes_activations`` says."""


def quantizes_activations(platform: Platform, dtype: str) -> str | None:
    """Why vLLM's CPU kernel would silently run W4A8 instead of W4A16, or None."""
    from vllm import envs

    risky = "amx" in platform.features or platform.machine.startswith("riscv")
    if dtype == "bfloat16" and risky and getattr(envs, "VLLM_CPU_INT4_W4A8", False):
        return f"{ROUNDS_X} (set VLLM_CPU_INT4_W4A8=0 to run the exact kernel)"
    return None


@cache
def _parameter_class() -> type:
    from vllm.model_executor.parameter import BasevLLMParameter

    class RepackedParameter(BasevLLMParameter):  # type: ignore[misc,unused-ignore]
        """vLLM's parameter class as its kernels see it; nothing is ever loaded into it.

        The base class asks for the tensor-parallel group, which preparation must not need.
        """

        def __init__(self, data: torch.Tensor, **attributes: int | None) -> None:
            self._weight_loader = None
            self.tp_rank, self.tp_size = 0, 1
            for name, value in attributes.items():
                setattr(self, name, value)

    return RepackedParameter


def repack(
    kernel: Any, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.nn.Module:
    """Run vLLM's repacking and return the layer it was done on.

    codes: int32 [N, K·bits/32], packed along K. scale: [N, G] of the activations' dtype. zero:
    int32 [N·bits/32, G], packed along N. That is compressed-tensors' layout.
    """
    factor = 32 // int(kernel.config.weight_type.size_bits)
    layer = checkpoint_layer(codes, scale, zero, factor)
    kernel.process_weights_after_loading(layer)
    return layer


def checkpoint_layer(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, factor: int
) -> torch.nn.Module:
    """A layer with the parameters of vLLM's compressed-tensors method, as ``repack`` takes them;
    ``factor``: codes in a container."""
    make = _parameter_class()
    layer = torch.nn.Module()
    layer.register_parameter(
        CODES, make(codes, input_dim=1, output_dim=0, packed_dim=1, packed_factor=factor)
    )
    layer.register_parameter(SCALE, make(scale, input_dim=1, output_dim=0))
    if zero is not None:
        layer.register_parameter(
            ZERO, make(zero, input_dim=1, output_dim=0, packed_dim=0, packed_factor=factor)
        )
    layer.register_parameter("bias", None)
    return layer


def build(kernel: Any, request: KernelRequest) -> Any:
    """An instance of vLLM's class ``kernel``. ``ValueError`` if it declines ``request`` (its own
    constructor asserts a tuple, which is always true)."""
    reasons = class_reasons(kernel, request)
    if reasons:
        raise ValueError(f"{kernel.__name__} cannot run {request}: {'; '.join(reasons)}")
    return kernel(
        mixed_precision_config(request),
        w_q_param_name=CODES,
        w_s_param_name=SCALE,
        w_zp_param_name=ZERO,
    )


@lru_cache(maxsize=256)
def repacked_attributes(kernel: Any) -> dict[str, Any]:
    """The attributes, tensors apart, that repacking by ``kernel`` sets on a layer, found by
    repacking a weight of the least size."""
    config, least = kernel.config, 32
    bits = int(config.weight_type.size_bits)
    zero = torch.zeros(least * bits // 32, 1, dtype=torch.int32) if config.zero_points else None
    codes = torch.zeros(least, least * bits // 32, dtype=torch.int32)
    layer = repack(kernel, codes, torch.ones(least, 1, dtype=config.act_type), zero)
    unset = set(vars(torch.nn.Module()))
    return {name: value for name, value in vars(layer).items() if name not in unset}
