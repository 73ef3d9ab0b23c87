# SPDX-License-Identifier: Apache-2.0
"""vLLM's mixed-precision kernel class for CPUs, ``CPUWNA16LinearKernel``, run from a descriptor.

What the classes' own checks do not say, found by reading and by trying (vLLM 0.32):

* without zero points the operator always takes code 8 as 0, also for ``uint4``; here any other bias
  becomes constant zero points, which it does compute
* activations and scales must have one 16-bit dtype; scales of another are cast, as vLLM does too
* each dequantised weight is rounded to that dtype before it is multiplied, so ``weight_rounding``
* the last stride of x is taken to be 1, whatever it is
* with AMX and bf16, ``VLLM_CPU_INT4_W4A8`` (on by default) quantises the activations: declined.
  Switched off, the class takes the operator's AMX path, tried with emulated tile instructions only
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from vllm.compressed_linear.backends.base import Capabilities
from vllm.compressed_linear.backends.shared.call_counter import CallCounter
from vllm.compressed_linear.backends.vllm_native.classes import mixed_precision
from vllm.compressed_linear.backends.vllm_native.classes.mixed_precision import (
    CODES,
    SCALE,
    ZERO,
    KernelRequest,
)
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine.cost import roofline
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.activation import gather_channels
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import dtype_name, torch_dtype
from vllm.compressed_linear.spec.packing import Packing, pack

CPU_KERNEL = "CPUWNA16LinearKernel"
CPU_OP = "cpu_gemm_wna16"
SYMMETRIC_BIAS = 8
ORDER = "order"

_ALONG_N = {CODES: 0, SCALE: 1, ZERO: 1}
"""Dimension along N of each repacked tensor; repacking works on blocks of 16 output channels, so a
weight can be repacked in pieces and joined."""

PIECE_CODES = 1 << 20
"""Codes repacked at once: vLLM unpacks them to int32 several times over."""

_N_MULTIPLE = 32
_LARGEST_CODE = 15

_CALL_SECONDS = 50e-6
"""An op in Python that builds vLLM's kernel object anew."""

CALLS = CallCounter()


@torch.library.custom_op("compressed_linear::vllm_native_cpu_gemm_wna16", mutates_args=())
def vllm_native_cpu_gemm_wna16(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x [M, K] → [M, N] through ``CPUWNA16LinearKernel``.

    weight_packed int32 [N/16, 2·k], weight_scale [G, N], weight_zero_point int32 [G, N/8], as vLLM
    repacks them; order int32 [k] or None. The kernel object is rebuilt from shapes and dtypes, so
    nothing but tensors crosses into a compiled graph.
    """
    n = weight_scale.shape[1]
    if order is not None:
        x = gather_channels(x, order)
    elif x.stride(1) != 1:
        x = x.contiguous()
    if not x.shape[0]:
        return x.new_empty(0, n)
    k = x.shape[1]
    request = KernelRequest(
        k=k,
        n=n,
        bits=4,
        bias=SYMMETRIC_BIAS if weight_zero_point is None else 0,
        zero_points=weight_zero_point is not None,
        group_size=k // weight_scale.shape[0],
        dtype=dtype_name(x.dtype),
    )
    tensors = {CODES: weight_packed, SCALE: weight_scale, ZERO: weight_zero_point}
    CALLS.add()
    return mixed_precision.apply(
        CPU_KERNEL, "cpu", request, tensors, x, None if bias is None else bias.contiguous()
    )


@vllm_native_cpu_gemm_wna16.register_fake
def _(
    x: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight_scale.shape[1])


def _request(descriptor: CompressedLinearDescriptor) -> KernelRequest:
    element = descriptor.weight.element
    zero_points = descriptor.weight.zero is not None or _constant_zero(descriptor) is not None
    group = descriptor.group_size
    return KernelRequest(
        k=descriptor.k,
        n=descriptor.n,
        bits=element.bits,
        bias=0 if zero_points else element.bias,
        zero_points=zero_points,
        group_size=-1 if group == descriptor.k else group,
        dtype=descriptor.input_dtype,
    )


def _constant_zero(descriptor: CompressedLinearDescriptor) -> int | None:
    """The zero point that stands for a bias which the operator cannot take, or None."""
    element = descriptor.weight.element
    if element.bits != 4 or descriptor.weight.zero is not None or element.bias == SYMMETRIC_BIAS:
        return None
    return element.bias


CAPABILITIES = Capabilities(
    devices=frozenset({"cpu"}),
    integer_bits=frozenset({4}),
    input_dtypes=frozenset({"bfloat16", "float16"}),
    zero_kinds=frozenset({"integer"}),
    channel_order=True,
    padded_order=True,
)


def reasons(descriptor: CompressedLinearDescriptor, platform: Platform) -> Iterable[str]:
    """Why vLLM's kernel for CPUs does not run ``descriptor``, beyond ``CAPABILITIES``."""
    yield from _descriptor_reasons(descriptor)
    missing = mixed_precision.unavailable()
    if missing is not None:
        yield missing
        return
    missing = mixed_precision.missing_cpu_op(CPU_OP, platform)
    if missing is not None:
        yield missing
    quantised = mixed_precision.quantises_activations(platform, descriptor.input_dtype)
    if quantised is not None:
        yield quantised
    if descriptor.weight.element.kind == "integer" and descriptor.n and descriptor.k:
        yield from _class_reasons(descriptor, platform)


def weight_rounding(descriptor: CompressedLinearDescriptor) -> float:
    """See ``Contract.weight_rounding``."""
    unit = torch.finfo(torch_dtype(descriptor.input_dtype)).eps / 2
    scale = descriptor.weight.scale
    cast = scale is not None and scale.dtype != descriptor.input_dtype
    return (1 + unit) ** 2 - 1 if cast else unit


def seconds(descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
    """See ``QuantLinearMethod.seconds``."""
    weights = descriptor.n * descriptor.k
    # All of it is first expanded to 16 bits in a buffer. Rates measured on a Zen 4 core.
    return roofline(
        platform,
        read_bytes=weights / 2 + 2.5 * descriptor.n * descriptor.groups,
        operations=2.0 * m * weights,
        arithmetic="bf16",
        efficiency=0.43,
        decode_seconds=weights / (6.5e9 * platform.threads),
        call_seconds=_CALL_SECONDS,
    )


def prepare(d: CompressedLinearDescriptor, weights: CompressedWeights) -> dict[str, torch.Tensor]:
    """What vLLM's class makes of ``weights``, a piece at a time."""
    kernel = mixed_precision.build(CPU_KERNEL, "cpu", _request(d))
    tensors: dict[str, torch.Tensor] = {}
    step = max(PIECE_CODES // d.k // _N_MULTIPLE, 1) * _N_MULTIPLE
    for start in range(0, d.n, step):
        stop = min(start + step, d.n)
        for name, piece in _repacked_rows(d, kernel, weights, start, stop).items():
            dim = _ALONG_N[name]
            if name not in tensors:
                shape = list(piece.shape)
                shape[dim] = shape[dim] * d.n // (stop - start)
                tensors[name] = piece.new_empty(shape)
            first, last = (tensors[name].shape[dim] * row // d.n for row in (start, stop))
            tensors[name].narrow(dim, first, last - first).copy_(piece)
    if weights.permutation is not None:
        tensors[ORDER] = weights.permutation
    return tensors


def _repacked_rows(
    d: CompressedLinearDescriptor,
    kernel: object,
    weights: CompressedWeights,
    start: int,
    stop: int,
) -> dict[str, torch.Tensor]:
    rows = weights.rows(start, stop)
    if rows.scale is None:
        raise ValueError(f"vllm_native: weights without scales, descriptor {d}")
    scale = rows.scale.to(torch_dtype(d.input_dtype), copy=True)
    largest = float(scale.abs().max())
    if largest * _LARGEST_CODE > torch.finfo(scale.dtype).max:
        raise ValueError(
            f"vllm_native: scale {largest:g} in output channels {start} to {stop - 1}, whose "
            f"weights {CPU_KERNEL} could not hold in {d.input_dtype}"
        )
    zero = rows.zero
    constant = _constant_zero(d)
    if constant is not None:
        zero = torch.full(scale.shape, constant, dtype=torch.uint8)
    if zero is not None and int(zero.max()) > _LARGEST_CODE:
        raise ValueError(
            f"vllm_native: zero point {int(zero.max())} in output channels {start} to "
            f"{stop - 1}, expected at most {_LARGEST_CODE} ({CPU_KERNEL} packs them in 4 bits)"
        )
    layer = mixed_precision.repack(
        kernel,
        pack(rows.codes, Packing(4, "K")),
        scale,
        None if zero is None else pack(zero, Packing(4, "N"), dim=0),
    )
    if getattr(layer, "use_w4a8", False):
        raise RuntimeError(
            "vllm_native: vLLM repacked the weights for 8-bit activations although the "
            f"descriptor ({d}) has none; set VLLM_CPU_INT4_W4A8=0"
        )
    return mixed_precision.repacked_tensors(layer)


def call(
    d: CompressedLinearDescriptor,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The operator on what ``prepare`` returned."""
    out: torch.Tensor = torch.ops.compressed_linear.vllm_native_cpu_gemm_wna16(
        x.reshape(-1, x.shape[-1]),
        tensors[CODES],
        tensors[SCALE],
        tensors.get(ZERO),
        tensors.get(ORDER),
        bias,
    )
    return out.reshape(*x.shape[:-1], d.out_features)


def _descriptor_reasons(d: CompressedLinearDescriptor) -> Iterable[str]:
    """Rules of ``cpu_gemm_wna16`` that vLLM's class has no field for."""
    if not d.n or not d.k:
        yield f"an empty weight ({d.n}x{d.k})"
    if d.output_dtype != d.input_dtype:
        yield f"output dtype {d.output_dtype} (supported: that of the input, {d.input_dtype})"
    if d.bias_dtype is not None and d.bias_dtype != d.input_dtype:
        yield f"bias dtype {d.bias_dtype} (supported: that of the input, {d.input_dtype})"
    scale, element = d.weight.scale, d.weight.element
    if scale is not None and d.input_dtype == "float16" and scale.dtype != "float16":
        # bfloat16 holds every scale with a rounding; float16 would lose large and small ones.
        yield f"scale dtype {scale.dtype} with float16 activations (supported: float16)"
    if scale is None and element.kind != "dense":
        yield "weights without scales"
    if element.kind == "integer" and element.bias and d.weight.zero is not None:
        yield f"zero points on top of a bias of {element.bias}"
    if element.kind == "integer" and not 0 <= element.bias <= _LARGEST_CODE and element.bits == 4:
        yield f"bias {element.bias} (supported: 0 to {_LARGEST_CODE})"


def _class_reasons(d: CompressedLinearDescriptor, platform: Platform) -> Iterable[str]:
    """Empty if the wired class takes the descriptor, else what each of vLLM's classes says."""
    request = _request(d)
    answers = {
        kernel.__name__: mixed_precision.class_reasons(kernel, request)
        for kernel in mixed_precision.kernel_classes(platform.device)
    }
    if CPU_KERNEL not in answers:
        yield f"this vLLM has no kernel class {CPU_KERNEL}"
    elif not answers[CPU_KERNEL]:
        return
    for name, reasons in answers.items():
        for reason in reasons or ["accepts this, but is not wired to descriptors"]:
            yield f"{name}: {reason}"
