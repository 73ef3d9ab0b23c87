# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's kernel classes runs a descriptor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm.compressed_linear.backends.vllm_native import (
    cpu,
    declined,
    dense,
    fp4,
    fp8,
    fp8_block,
    mixed_precision,
    nvfp4,
    scaled_mm,
    torch_fp8,
)
from vllm.compressed_linear.backends.vllm_native.adapter import (
    KernelAdapter,
    common_reasons,
    rounded_weights,
)
from vllm.compressed_linear.backends.vllm_native.classes import operators, tables
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import E2M1, E2M3, E3M2, E4M3

ADAPTERS: tuple[KernelAdapter, ...] = (
    *mixed_precision.KERNELS,
    *scaled_mm.KERNELS,
    *torch_fp8.KERNELS,
    *fp8.KERNELS,
    *fp8_block.KERNELS,
    *fp4.KERNELS,
    *nvfp4.KERNELS,
    *dense.KERNELS,
    *cpu.KERNELS,
)
"""Every class that is wired."""

DENSE = "dense"
"""The family of weights that are not quantized, of which vLLM has no table."""


def by_tag(tag: str) -> KernelAdapter:
    """The adapter whose prepared tensors begin with ``tag``; ``KeyError`` if there is none."""
    return {adapter.tag: adapter for adapter in ADAPTERS}[tag]


def family_of(d: CompressedLinearDescriptor) -> str | None:
    """The family of vLLM's kernels that compute what ``d`` says, or None."""
    element, scale = d.weight.element, d.weight.scale
    if element.kind == "dense":
        return DENSE
    if element.kind == "integer":
        return "mixed precision" if d.activation is None else "int8"
    if element == E4M3 and d.activation is not None:
        blocks = scale is not None and scale.granularity == "block"
        kind = d.activation.kind
        if kind in fp8_block.KINDS or (blocks and kind == fp8_block.POWERS_OF_TWO):
            return "fp8 blocks"
    mx = scale is not None and scale.dtype == "e8m0"
    if element == E2M1:
        return "mxfp4" if mx else "nvfp4"
    if element == E4M3:
        return "mxfp8" if mx else "fp8 weights" if d.activation is None else "fp8"
    if element in (E2M3, E3M2):
        return "mxfp6"
    return None


@dataclass(frozen=True)
class Answer:
    """What one of vLLM's classes says of a descriptor: its adapter if it is wired, and every reason
    why it does not run it."""

    kernel: str
    adapter: KernelAdapter | None
    reasons: tuple[str, ...]


def answers(d: CompressedLinearDescriptor, platform: Platform) -> list[Answer]:
    """The answer of each class of the descriptor's family, in vLLM's order of preference.

    ``ValueError`` where there is no family, or this vLLM does not have it."""
    family = family_of(d)
    if family is None:
        raise ValueError(f"vLLM has no family of kernels for {d}")
    if family == DENSE:
        (adapter,) = dense.KERNELS
        return [Answer(adapter.kernel, adapter, tuple(adapter.reasons(d)))]
    missing = tables.unavailable(family)
    if missing is not None:
        raise ValueError(missing)
    wired = {adapter.kernel: adapter for adapter in ADAPTERS if adapter.family == family}
    return [
        _answer(kernel, wired.get(kernel.__name__), d, platform)
        for kernel in tables.kernel_classes(family, platform.device)
    ]


def _answer(
    kernel: type, adapter: KernelAdapter | None, d: CompressedLinearDescriptor, platform: Platform
) -> Answer:
    name = kernel.__name__
    if adapter is None or platform.device not in adapter.devices:
        return Answer(name, None, (declined.why(name),))
    reasons = list(adapter.reasons(d))
    scale = d.weight.scale
    if scale is not None and scale.dtype not in adapter.scale_dtypes:
        supported = ", ".join(sorted(adapter.scale_dtypes))
        reasons.append(f"scale dtype {scale.dtype} (supported: {supported})")
    if d.weight.row_scale is not None and not adapter.row_scale:
        reasons.append("second-level scales")
    oldest, newest, have = adapter.min_capability, adapter.max_capability, platform.capability
    if oldest is not None and have is not None and have < oldest:
        reasons.append(f"compute capability {have} is too old (at least {oldest})")
    if newest is not None and have is not None and have > newest:
        reasons.append(f"compute capability {have} is too new (at most {newest})")
    if not reasons:
        refused = tables.refusal(kernel, adapter.config(d), platform)
        reasons += [] if refused is None else [refused]
    if not reasons:
        missing = (operators.missing_op(op, platform) for op in adapter.ops)
        reasons += [reason for reason in missing if reason is not None]
    return Answer(name, adapter, tuple(reasons))


def reasons(d: CompressedLinearDescriptor, platform: Platform) -> Iterable[str]:
    """Why no class runs ``d`` on ``platform``, beyond what is declared of all of them."""
    yield from common_reasons(d)
    if platform.device == "cpu":
        yield from cpu.reasons(d, platform)
        return
    if not d.n or not d.k:
        return
    try:
        found = answers(d, platform)
    except ValueError as error:
        yield str(error)
        return
    if not found:
        yield f"this vLLM has no {family_of(d)} kernel classes for {platform.device}"
    if preferred(found) is None:
        for answer in found:
            yield from (f"{answer.kernel}: {reason}" for reason in answer.reasons)


def adapter_for(d: CompressedLinearDescriptor, platform: Platform) -> KernelAdapter:
    """The class that runs ``d`` on ``platform``; ``ValueError`` if none does."""
    if platform.device == "cpu":
        return cpu.KERNELS[0]
    adapter = preferred(answers(d, platform))
    if adapter is None:
        raise ValueError(f"none of vLLM's kernel classes for {platform.name} can run {d}")
    return adapter


def weight_rounding(d: CompressedLinearDescriptor) -> float:
    """The most of the classes that compute what ``d`` says, on whatever device."""
    family = family_of(d)
    able = [a for a in ADAPTERS if a.family == family and not any(a.reasons(d))]
    return max((a.weight_rounding(d) for a in able), default=rounded_weights(d))


def preferred(found: Iterable[Answer]) -> KernelAdapter | None:
    """The first class that runs the descriptor, as vLLM would choose, or None."""
    return next((a.adapter for a in found if a.adapter is not None and not a.reasons), None)


def prepared_bytes(d: CompressedLinearDescriptor) -> int:
    """What the classes of the descriptor's family make of its weights; the most, if they differ."""
    family = family_of(d)
    return max((a.prepared_bytes(d) for a in ADAPTERS if a.family == family), default=0)
