# SPDX-License-Identifier: Apache-2.0
"""vLLM's mixed-precision kernel class for CPUs, ``CPUWNA16LinearKernel``.

What the classes' own checks do not say, found by reading and by trying (vLLM 0.32):

* without zero points the operator always takes code 8 as 0, also for ``uint4``; here any other bias
  becomes constant zero points, which it does compute
* activations and scales must have one 16-bit dtype; scales of another are cast, as vLLM does too
* each dequantized weight is rounded to that dtype before it is multiplied
* the last stride of x is taken to be 1, whatever it is
* with AMX and bf16, ``VLLM_CPU_INT4_W4A8`` (on by default) quantizes the activations: declined.
  Switched off, the class takes the operator's AMX path, which passed the kit on Emerald Rapids
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from vllm.compressed_linear.backends.base import Capabilities
from vllm.compressed_linear.backends.vllm_native.adapter import cast_scales
from vllm.compressed_linear.backends.vllm_native.classes import mixed_precision, operators, tables
from vllm.compressed_linear.backends.vllm_native.classes.mixed_precision import CODES, SCALE, ZERO
from vllm.compressed_linear.backends.vllm_native.mixed_precision import (
    MixedPrecision,
    packed_zeros,
    request,
    weight_reasons,
)
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine.cost import roofline
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.packing import Packing, pack

CPU_KERNEL = "CPUWNA16LinearKernel"
CPU_OP = "_C::cpu_gemm_wna16"

CAPABILITIES = Capabilities(
    devices=frozenset({"cpu"}),
    integer_bits=frozenset({4}),
    input_dtypes=frozenset({"bfloat16", "float16"}),
    zero_kinds=frozenset({"integer"}),
    channel_order=True,
    padded_order=True,
)

_ALONG_N = {CODES: 0, SCALE: 1, ZERO: 1}
"""Dimension along N of each repacked tensor; repacking works on blocks of 16 output channels, so a
weight can be repacked in pieces and joined."""

PIECE_CODES = 1 << 20
"""Codes repacked at once: vLLM unpacks them to int32 several times over."""

_N_MULTIPLE = 32
_LARGEST_CODE = 15

_CALL_SECONDS = 50e-6
"""An op in Python that puts vLLM's layer together anew."""


@dataclass(frozen=True, kw_only=True)
class CpuWna16(MixedPrecision):
    """``CPUWNA16LinearKernel``, repacked a piece at a time."""

    adds_bias = True

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        yield from weight_reasons(d)

    def instance(self, d: CompressedLinearDescriptor, device: str) -> Any:
        # The operator multiplies with AMX and does not ask the kernel for the right to: without it
        # the process ends with an illegal instruction.
        torch.cpu._init_amx()
        kernel = tables.kernel_class(self.family, device, self.kernel)
        return mixed_precision.build(kernel, request(d))

    def prepare(
        self, kernel: Any, d: CompressedLinearDescriptor, weights: CompressedWeights
    ) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        step = max(PIECE_CODES // d.k // _N_MULTIPLE, 1) * _N_MULTIPLE
        for start in range(0, d.n, step):
            stop = min(start + step, d.n)
            for name, piece in self._piece(kernel, d, weights, start, stop).items():
                dim = _ALONG_N[name]
                if name not in tensors:
                    shape = list(piece.shape)
                    shape[dim] = shape[dim] * d.n // (stop - start)
                    tensors[name] = piece.new_empty(shape)
                first, last = (tensors[name].shape[dim] * row // d.n for row in (start, stop))
                tensors[name].narrow(dim, first, last - first).copy_(piece)
        return tensors

    def _piece(
        self,
        kernel: Any,
        d: CompressedLinearDescriptor,
        weights: CompressedWeights,
        start: int,
        stop: int,
    ) -> dict[str, torch.Tensor]:
        rows, where = weights.rows(start, stop), f" in output channels {start} to {stop - 1}"
        if rows.scale is None:
            raise ValueError(f"vllm_native: weights without scales, descriptor {d}")
        # A copy: repacking is in place, and these may be the checkpoint's.
        scale = cast_scales(d, rows.scale.clone(), _LARGEST_CODE, where)
        zero = packed_zeros(d, rows.zero, scale, self.kernel, where)
        layer = mixed_precision.repack(kernel, pack(rows.codes, Packing(4, "K")), scale, zero)
        if getattr(layer, "use_w4a8", False):
            raise RuntimeError(
                "vllm_native: vLLM repacked the weights for 8-bit activations although the "
                f"descriptor ({d}) has none; set VLLM_CPU_INT4_W4A8=0"
            )
        return self.prepared(layer)

    def run(
        self, kernel: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        attributes = mixed_precision.repacked_attributes(kernel)
        whole = SimpleNamespace(**{ZERO: None, **attributes, **vars(layer)})
        return super().run(kernel, whole, x, None if bias is None else bias.contiguous())

    def seconds(self, d: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        weights = d.n * d.k
        # All of it is first expanded to 16 bits in a buffer. Measured on a core of Zen 4, and with
        # tiles on one of Emerald Rapids.
        tiles = "amx" in platform.features and d.input_dtype == "bfloat16"
        expanded, efficiency = (4e9, 0.28) if tiles else (6.5e9, self.efficiency)
        return roofline(
            platform,
            read_bytes=weights / 2 + 2.5 * d.n * d.groups,
            operations=2.0 * m * weights,
            arithmetic=self.arithmetic,
            efficiency=efficiency,
            decode_seconds=weights / (expanded * platform.threads),
            call_seconds=_CALL_SECONDS,
        )

    def hardware_tested(self, platform: Platform) -> bool:
        # The operator has a path for Arm that no machine here has run.
        return "neon" not in platform.features


KERNELS = (
    CpuWna16(
        kernel=CPU_KERNEL,
        tag="cpuwna16",
        ops=(CPU_OP,),
        devices=CAPABILITIES.devices,
        efficiency=0.43,
    ),
)


def reasons(d: CompressedLinearDescriptor, platform: Platform) -> Iterable[str]:
    """Why vLLM's kernel for CPUs does not run ``d``, beyond ``CAPABILITIES`` and the rules of every
    class."""
    if d.weight.element.kind != "dense":
        yield from weight_reasons(d)
    if (missing := tables.unavailable("mixed precision")) is not None:
        yield missing
        return
    if (missing := operators.missing_op(CPU_OP, platform)) is not None:
        yield missing
    quantized = mixed_precision.quantizes_activations(platform, d.input_dtype)
    if quantized is not None:
        yield quantized
    if d.weight.element.kind == "integer" and d.n and d.k:
        yield from _class_reasons(d, platform)


def _class_reasons(d: CompressedLinearDescriptor, platform: Platform) -> Iterable[str]:
    """Empty if the wired class takes the descriptor, else what each of vLLM's classes says."""
    asked = request(d)
    answers = {
        kernel.__name__: mixed_precision.class_reasons(kernel, asked)
        for kernel in tables.kernel_classes("mixed precision", platform.device)
    }
    if CPU_KERNEL not in answers:
        yield f"this vLLM has no kernel class {CPU_KERNEL}"
    elif not answers[CPU_KERNEL]:
        return
    for name, found in answers.items():
        for reason in found or ["accepts this, but is not wired to descriptors"]:
            yield f"{name}: {reason}"
