# SPDX-License-Identifier: Apache-2.0
"""vLLM's mixed-precision classes on accelerators: integer weights, activations of 16 bits.

What their own checks do not say, found by reading vLLM 0.32:

* a weight type without a bias and without zero points (``uint4``) is taken by some classes and then
  computed with a bias; here any bias but the middle becomes constant zero points
* Machete multiplies zero points with the scale beforehand and rounds the product: what should be
  exactly 0 is not, which the numerical contract does not allow. Declined with zero points
* Conch, a package of Triton kernels, reads whole tiles of 64 by 64 whatever the size (read in 1.3)
* Exllama adds products and partial sums in fp16, CutlassW4A8 quantizes x and rounds the scales of
  groups to 8 bits: declined always
* a bias is added to the rounded result
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm.compressed_linear.backends.vllm_native.adapter import (
    KernelAdapter,
    cast_scales,
    packed_codes,
    scales,
    zero_points,
)
from vllm.compressed_linear.backends.vllm_native.classes import mixed_precision
from vllm.compressed_linear.backends.vllm_native.classes.mixed_precision import (
    CODES,
    SCALE,
    ZERO,
    KernelRequest,
)
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.spec.packing import Packing, pack


def request(d: CompressedLinearDescriptor) -> KernelRequest:
    """What vLLM's ``MPLinearLayerConfig`` says of ``d``."""
    constant = constant_zero(d)
    zeros = d.weight.zero is not None or constant is not None
    return KernelRequest(
        k=d.k,
        n=d.n,
        bits=d.weight.element.bits,
        bias=0 if zeros else d.weight.element.bias,
        zero_points=zeros,
        group_size=-1 if d.group_size == d.k else d.group_size,
        dtype=d.input_dtype,
    )


def constant_zero(d: CompressedLinearDescriptor) -> int | None:
    """The zero point that stands for a bias which no class can take, or None."""
    element = d.weight.element
    middle = 1 << (element.bits - 1)
    return None if d.weight.zero is not None or element.bias == middle else element.bias


def weight_reasons(d: CompressedLinearDescriptor) -> Iterable[str]:
    """Rules of every class here about numbers that a weight has."""
    element, scale = d.weight.element, d.weight.scale
    if element.bias and d.weight.zero is not None:
        yield f"zero points on top of a bias of {element.bias}"
    if not 0 <= element.bias < 1 << element.bits:
        yield f"bias {element.bias} (supported: 0 to {(1 << element.bits) - 1})"
    if scale is None:
        yield "weights without scales"
    elif d.input_dtype == "float16" and scale.dtype != "float16":
        # bfloat16 holds every scale with a rounding; float16 would lose large and small ones.
        yield f"scale dtype {scale.dtype} with float16 activations (supported: float16)"


def packed_zeros(
    d: CompressedLinearDescriptor,
    zero: torch.Tensor | None,
    scale: torch.Tensor,
    kernel: str,
    where: str = "",
) -> torch.Tensor | None:
    """``zero`` [N, G], or the constant in its place, as containers of int32 [N·bits/32, G]; None
    where there are none. ``where``: as in ``cast_scales``. ``ValueError`` if one does not fit."""
    bits = d.weight.element.bits
    if (constant := constant_zero(d)) is not None:
        zero = torch.full(scale.shape, constant, dtype=torch.uint8, device=scale.device)
    if zero is None:
        return None
    largest = (1 << bits) - 1
    if int(zero.max()) > largest:
        raise ValueError(
            f"vllm_native: zero point {int(zero.max())}{where}, expected at most {largest} "
            f"({kernel} packs them in {bits} bits)"
        )
    return pack(zero, Packing(bits, "N"), dim=0)


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(KernelAdapter):
    """One of vLLM's subclasses of ``MPLinearKernel``. ``zeros``: whether its zero points keep the
    numerical contract; ``never``: why it cannot keep it at all; ``multiple``: what N and K must be
    multiples of."""

    zeros: bool = True
    never: str = ""
    multiple: int = 1

    family = "mixed precision"

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        element = d.weight.element
        if self.never:
            yield self.never
        yield from weight_reasons(d)
        if d.weight.zero is not None and d.n % (32 // element.bits):
            yield f"zero points of {d.n} output channels do not fill containers of 32 bits"
        if not self.zeros and request(d).zero_points:
            yield (
                "zero points, which it multiplies with the scales beforehand and rounds, so that "
                "weights of 0 are none"
            )
        if d.n % self.multiple or d.k % self.multiple:
            yield f"{d.n}x{d.k} (supported: multiples of {self.multiple})"
        if d.k * element.bits % 32:
            yield f"K={d.k} codes of {element.bits} bits do not fill containers of 32 bits"

    def config(self, d: CompressedLinearDescriptor) -> object:
        return mixed_precision.mixed_precision_config(request(d))

    def build(self, kernel: Any, d: CompressedLinearDescriptor) -> Any:
        return kernel(
            self.config(d), w_q_param_name=CODES, w_s_param_name=SCALE, w_zp_param_name=ZERO
        )

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        bits = d.weight.element.bits
        scale = cast_scales(d, scales(d, weights), (1 << bits) - 1)
        zero = packed_zeros(d, zero_points(weights), scale, self.kernel)
        return mixed_precision.checkpoint_layer(packed_codes(d, weights), scale, zero, 32 // bits)

    def prepared_bytes(self, d: CompressedLinearDescriptor) -> int:
        groups = d.n * d.groups
        zeros = groups * d.weight.element.bits // 8 if request(d).zero_points else 0
        codes = d.n * d.k * d.weight.element.bits // 8
        return codes + groups * torch_dtype(d.input_dtype).itemsize + zeros


_ACCUMULATES = "adds products and partial sums in fp16, which the numerical contract does not allow"
_QUANTISES = (
    "quantizes x to fp8 and rounds the scales of groups to 8 bits, although the descriptor asks "
    "for neither"
)

KERNELS = (
    MixedPrecision(kernel="CutlassW4A8LinearKernel", tag="w4a8", never=_QUANTISES),
    MixedPrecision(
        kernel="MacheteLinearKernel",
        tag="machete",
        ops=("_C::machete_prepack_B", "_C::machete_mm"),
        zeros=False,
        efficiency=0.75,
    ),
    MixedPrecision(
        kernel="MarlinLinearKernel",
        tag="marlin",
        ops=("_C::gptq_marlin_repack", "_C::marlin_gemm"),
        arithmetic="mma",
        efficiency=0.7,
    ),
    MixedPrecision(
        kernel="ConchLinearKernel",
        tag="conch",
        devices=frozenset({"cuda", "rocm"}),
        multiple=64,
        efficiency=0.4,
    ),
    MixedPrecision(
        kernel="ExllamaLinearKernel",
        tag="exllama",
        never=_ACCUMULATES,
        devices=frozenset({"cuda", "rocm"}),
    ),
    MixedPrecision(
        kernel="TritonW4A16LinearKernel",
        tag="triton",
        devices=frozenset({"cuda", "rocm"}),
        efficiency=0.4,
    ),
)
"""In vLLM's order on CUDA."""
