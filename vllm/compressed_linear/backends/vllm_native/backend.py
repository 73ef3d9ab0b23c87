# SPDX-License-Identifier: Apache-2.0
"""The backend: the kernel class that vLLM prefers for the descriptor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from vllm.compressed_linear.backends.base import Capabilities, QuantLinearMethod, Verdict
from vllm.compressed_linear.backends.contract import Contract
from vllm.compressed_linear.backends.vllm_native import (
    cpu,
    fp8_block,
    nvfp4,
    op,
    scaled_mm,
    table,
)
from vllm.compressed_linear.backends.vllm_native.adapter import KernelAdapter
from vllm.compressed_linear.backends.vllm_native.classes import process
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import BF16, E2M1, E4M3, FP16, torch_dtype

ACCELERATORS = Capabilities(
    devices=frozenset({"cuda", "rocm", "xpu"}),
    integer_bits=frozenset({4, 8}),
    other_elements=frozenset(e.name for e in (E4M3, E2M1, BF16, FP16)),
    input_dtypes=frozenset({"bfloat16", "float16"}),
    scale_dtypes=frozenset({"bfloat16", "float16", "float32", "float8_e4m3fn", "e8m0"}),
    zero_kinds=frozenset({"integer"}),
    channel_order=True,
    padded_order=True,
    row_scale=True,
    activations=frozenset(
        {*scaled_mm.INT8_KINDS, *scaled_mm.FP8_KINDS, *fp8_block.KINDS, nvfp4.ACTIVATION.kind}
    ),
)
"""What one or another of vLLM's classes for accelerators can do."""


class VllmNativeBackend(QuantLinearMethod):
    """vLLM's own kernels, for every checkpoint format."""

    name = "vllm_native"
    capabilities = Capabilities(
        devices=cpu.CAPABILITIES.devices | ACCELERATORS.devices,
        integer_bits=cpu.CAPABILITIES.integer_bits | ACCELERATORS.integer_bits,
        other_elements=ACCELERATORS.other_elements,
        input_dtypes=cpu.CAPABILITIES.input_dtypes | ACCELERATORS.input_dtypes,
        scale_dtypes=cpu.CAPABILITIES.scale_dtypes | ACCELERATORS.scale_dtypes,
        zero_kinds=cpu.CAPABILITIES.zero_kinds | ACCELERATORS.zero_kinds,
        channel_order=True,
        padded_order=True,
        row_scale=ACCELERATORS.row_scale,
        activations=ACCELERATORS.activations,
    )
    """Of all devices together; what each can do is in ``cpu.CAPABILITIES`` and ``ACCELERATORS``."""
    batch_invariant = False

    def __init__(self, descriptor: CompressedLinearDescriptor) -> None:
        super().__init__(descriptor)
        self.text = op.text_of(descriptor)

    @classmethod
    def can_implement(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> Verdict:
        declared = cpu.CAPABILITIES if platform.device == "cpu" else ACCELERATORS
        reasons = [*declared.reasons(descriptor, platform)]
        if platform.device in declared.devices:
            reasons += table.reasons(descriptor, platform)
        return Verdict(tuple(dict.fromkeys(reasons)))

    @classmethod
    def contract(cls, descriptor: CompressedLinearDescriptor) -> Contract:
        unit = torch.finfo(torch_dtype(descriptor.input_dtype)).eps / 2
        # A class rounds its result before the bias is added; no more than the sum itself can be.
        bias = 0.0 if descriptor.bias_dtype is None else unit
        spec, slack = descriptor.activation, None
        if spec is not None:
            slack = nvfp4.slack if spec == nvfp4.ACTIVATION else partial(scaled_mm.slack, spec)
        return Contract(weight_rounding=table.weight_rounding(descriptor) + bias, input_slack=slack)

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        return table.adapter_for(descriptor, platform).seconds(descriptor, platform, m)

    @classmethod
    def variant(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> str:
        return table.adapter_for(descriptor, platform).kernel

    @classmethod
    def hardware_tested(cls, platform: Platform, variant: str = "") -> bool:
        return any(
            adapter.hardware_tested(platform)
            for adapter in table.ADAPTERS
            if platform.device in adapter.devices and variant in ("", adapter.kernel)
        )

    @classmethod
    def prepared_bytes(cls, descriptor: CompressedLinearDescriptor) -> int | None:
        order = descriptor.channel_order
        gather = 0 if order is None else descriptor.k * torch.int32.itemsize
        return table.prepared_bytes(descriptor) + gather

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        return prepare(self.descriptor, weights, Platform.detect(process.device()))

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return op.call(self.descriptor, self.text, tensors, x, bias, process.device())


def prepare(
    d: CompressedLinearDescriptor,
    weights: CompressedWeights,
    platform: Platform,
    adapter: KernelAdapter | None = None,
) -> dict[str, torch.Tensor]:
    """What the class of ``adapter``, or else the one that is preferred on ``platform``, makes of
    ``weights``; the names begin with the tag of its adapter."""
    adapter = adapter or table.adapter_for(d, platform)
    _, kernel, _ = op.ready(adapter.tag, op.text_of(d), platform.device)
    own = adapter.prepare(kernel, d, weights)
    tensors = {f"{adapter.tag}_{name}": tensor for name, tensor in own.items()}
    if weights.permutation is not None:
        tensors[op.ORDER] = weights.permutation
    if (ratio := adapter.ratio(d, weights)) is not None:
        tensors[op.ROW_SCALE] = ratio.to(adapter.result_dtype(d))
    return tensors
