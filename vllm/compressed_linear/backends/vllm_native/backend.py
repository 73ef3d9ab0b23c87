# SPDX-License-Identifier: Apache-2.0
"""The backend: one of vLLM's own kernel classes, whichever vLLM would prefer for the descriptor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from vllm.compressed_linear.backends.vllm_native.adapter import KernelAdapter, common_reasons
from vllm.compressed_linear.backends.vllm_native.classes import accelerators
from vllm.compressed_linear.backends.vllm_native.classes.mixed_precision import CODES
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine.cost import roofline
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
        on_cpu = platform.device == "cpu"
        declared = cpu.CAPABILITIES if on_cpu else ACCELERATORS
        reasons = [*declared.reasons(descriptor, platform)]
        if on_cpu or platform.device in declared.devices:
            further = cpu.reasons if on_cpu else _accelerator_reasons
            reasons += further(descriptor, platform)
        return Verdict(tuple(dict.fromkeys(reasons)))

    @classmethod
    def contract(cls, descriptor: CompressedLinearDescriptor) -> Contract:
        unit = torch.finfo(torch_dtype(descriptor.input_dtype)).eps / 2
        # A class rounds its result before the bias is added; no more than the sum itself can be.
        bias = 0.0 if descriptor.bias_dtype is None else unit
        # The kernel for CPUs rounds as the mixed-precision ones do.
        weights = max(_roundings(descriptor), default=cpu.weight_rounding(descriptor))
        spec, slack = descriptor.activation, None
        if spec is not None:
            nvfp4_input = spec == nvfp4.ACTIVATION
            slack = nvfp4.slack if nvfp4_input else partial(scaled_mm.slack, spec)
        return Contract(weight_rounding=weights + bias, input_slack=slack)

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        if platform.device == "cpu":
            return cpu.seconds(descriptor, platform, m)
        d, adapter = descriptor, _adapter(descriptor, platform)
        width = torch_dtype(d.input_dtype).itemsize
        return roofline(
            platform,
            read_bytes=adapter.prepared_bytes(d) + width * m * (d.k + d.n),
            operations=2.0 * m * d.n * d.k,
            arithmetic=adapter.arithmetic,
            efficiency=adapter.efficiency,
        )

    @classmethod
    def variant(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> str:
        if platform.device == "cpu":
            return cpu.CPU_KERNEL
        return _adapter(descriptor, platform).kernel

    @classmethod
    def hardware_tested(cls, platform: Platform, variant: str = "") -> bool:
        # The operator has a path for AMX, and one for Arm, that no machine here has run.
        return platform.device == "cpu" and not {"amx", "neon"} & platform.features

    @classmethod
    def prepared_bytes(cls, descriptor: CompressedLinearDescriptor) -> int | None:
        order = descriptor.channel_order
        gather = 0 if order is None else descriptor.k * torch.int32.itemsize
        return table.prepared_bytes(descriptor) + gather

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        if weights.device.type == "cpu":
            return cpu.prepare(self.descriptor, weights)
        platform = Platform.detect(accelerators.device())
        return prepare(self.descriptor, weights, platform)

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if CODES in tensors:
            return cpu.call(self.descriptor, tensors, x, bias)
        device = accelerators.device()
        return op.call(self.descriptor, self.text, tensors, x, bias, device)


def _accelerator_reasons(d: CompressedLinearDescriptor, platform: Platform) -> Iterable[str]:
    yield from common_reasons(d)
    if d.n and d.k:
        try:
            found = table.answers(d, platform)
        except ValueError as error:
            yield str(error)
            return
        if not found:
            yield f"this vLLM has no {table.family_of(d)} kernel classes for {platform.device}"
        if table.preferred(found) is None:
            for answer in found:
                yield from (f"{answer.kernel}: {reason}" for reason in answer.reasons)


def _adapter(d: CompressedLinearDescriptor, platform: Platform) -> KernelAdapter:
    adapter = table.preferred(table.answers(d, platform))
    if adapter is None:
        raise ValueError(f"none of vLLM's kernel classes for {platform.name} can run {d}")
    return adapter


def _roundings(d: CompressedLinearDescriptor) -> list[float]:
    """Of the classes that compute what ``d`` says, whatever the GPU."""
    family = [a for a in table.ADAPTERS if a.family == table.family_of(d)]
    return [a.weight_rounding(d) for a in family if not any(a.reasons(d))]


def prepare(
    d: CompressedLinearDescriptor,
    weights: CompressedWeights,
    platform: Platform,
    adapter: KernelAdapter | None = None,
) -> dict[str, torch.Tensor]:
    """What the class of ``adapter``, or else the one that is preferred on ``platform``, makes of
    ``weights``; the names begin with the tag of its adapter."""
    adapter = adapter or _adapter(d, platform)
    _, kernel, attributes = op.ready(adapter.tag, op.text_of(d), platform.device)
    layer = adapter.layer(d, weights)
    for name, value in attributes.items():
        setattr(layer, name, value)
    adapter.repack(kernel, layer, d)
    tensors = {f"{adapter.tag}_{name}": t for name, t in adapter.prepared(layer).items()}
    if weights.permutation is not None:
        tensors[op.ORDER] = weights.permutation
    if (ratio := adapter.ratio(d, weights)) is not None:
        tensors[op.ROW_SCALE] = ratio.to(adapter.result_dtype(d))
    return tensors
