# SPDX-License-Identifier: Apache-2.0
"""Our own mixed-input GEMM of the Marlin kind for NVIDIA GPUs (``csrc/cuda/marlin``).

fp16 and bf16 activations times weights of 4 and 8 bits that stay packed: integers with and without
zero points, e4m3, e2m1 (NVFP4, MXFP4) and codebooks of 16 entries. Groups are added up in fp32 and
scaled then, so weights are not rounded; only a codebook's entries are, to the activations' dtype.

The kernels have run in an emulator (``csrc/cuda/emulator``), never on hardware: their results are
tested, their times are estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from vllm.compressed_linear.backends.base import Capabilities, QuantLinearMethod
from vllm.compressed_linear.backends.contract import Contract
from vllm.compressed_linear.backends.marlin import packing
from vllm.compressed_linear.backends.shared.side_tensors import small_bytes
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.cost import roofline
from vllm.compressed_linear.machine.platform import NATIVE_LIBRARY, Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import E2M1, E4M3, ElementType, torch_dtype

_TILE_K = 64
_SMALL_GROUPS = (16, 32)
_CODEBOOK_BITS = 4
_MMA_ROWS = 16
_EFFICIENCY = 0.5
"""Share of what ``mma.sync`` does at best. A guess, below what vLLM's Marlin is taken to reach:
that one has run on GPUs, so it goes first where both can compute a layer, until this one is
measured."""
_READ_SHARE = 0.8
"""Share of the memory's rate; a guess, too."""


class MarlinBackend(QuantLinearMethod):
    """Weight-only kernels on Marlin's layout.

    Prepared tensors: what ``marlin_preparation.prepare`` returns; ``codebook`` float32 [16] for
    codebooks; ``workspace`` int32 [1024], counters of parts of output tiles, zero between calls.
    """

    name = "marlin"
    capabilities = Capabilities(
        devices=frozenset({"cuda"}),
        integer_bits=frozenset({4, 8}),
        other_elements=frozenset({E4M3.name, E2M1.name}),
        codebooks=True,
        input_dtypes=frozenset({"bfloat16", "float16"}),
        scale_dtypes=frozenset({"bfloat16", "float16", "float32", "float8_e4m3fn", "e8m0"}),
        zero_kinds=frozenset({"integer"}),
        channel_order=True,
        padded_order=True,
        row_scale=True,
        required_ops=(NATIVE_LIBRARY,),
        min_capability=80,
    )

    def __init__(self, descriptor: CompressedLinearDescriptor) -> None:
        super().__init__(descriptor)
        # Made here because the compiler may hold ``bits`` symbolic, and a string must not be.
        self.element = _kernel_element(descriptor.weight.element)
        self.element_bias = descriptor.weight.element.bias
        self.output_dtype = torch_dtype(descriptor.output_dtype)

    @classmethod
    def further_reasons(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> Iterable[str]:
        d, element = descriptor, descriptor.weight.element
        if d.n == 0 or d.n % packing.TILE_N:
            yield f"{d.n} output channels (supported: multiples of {packing.TILE_N})"
        if d.k == 0 or d.k % packing.STRIP_K:
            yield f"{d.k} input channels (supported: multiples of {packing.STRIP_K})"
        if d.weight.scale is None:
            yield f"{element.name} weights without scales"
        size = d.group_size
        if d.groups > 1 and size % _TILE_K and size not in _SMALL_GROUPS:
            yield f"groups of {size} channels (supported: 16, 32, multiples of 64, all channels)"
        if element.codebook and element.bits != _CODEBOOK_BITS:
            yield f"codebook {element.name} of {element.bits} bits (supported: {_CODEBOOK_BITS})"
        elif element.codebook and not _rounded(d).isfinite().all():
            yield f"codebook {element.name} with entries that {d.input_dtype} does not hold"
        if element.bias and d.weight.zero is not None:
            yield f"zero points of {element.name} weights (supported: of plain unsigned integers)"
        if platform.device == "cuda" and torch.version.cuda is not None:
            reason = native.cuda_available()
            if reason is not None:
                yield reason

    @classmethod
    def contract(cls, descriptor: CompressedLinearDescriptor) -> Contract:
        """A codebook's entries are rounded to the dtype of x; all others are exact in it."""
        element = descriptor.weight.element
        if not element.codebook:
            return Contract()
        table = element.table().to(torch.float64)
        error = (_rounded(descriptor).to(torch.float64) - table).abs()
        relative = torch.where(table == 0, 0.0, error / table.abs())
        return Contract(weight_rounding=float(relative.max()))

    @classmethod
    def seconds(cls, descriptor: CompressedLinearDescriptor, platform: Platform, m: int) -> float:
        d = descriptor
        rows = -(-m // _MMA_ROWS) * _MMA_ROWS
        itemsize = torch_dtype(d.input_dtype).itemsize
        read = cls._weight_bytes(d) + m * (d.k + d.n) * itemsize
        if d.channel_order is not None:
            read += 2 * m * d.k * itemsize
        return roofline(
            platform,
            read_bytes=read / _READ_SHARE,
            operations=2.0 * rows * d.n * d.k,
            arithmetic="mma",
            efficiency=_EFFICIENCY,
        )

    @classmethod
    def _weight_bytes(cls, d: CompressedLinearDescriptor) -> int:
        bits = d.weight.element.bits
        total = d.n * d.k * bits // 8
        if d.weight.scale is not None:
            total += d.n * d.groups * torch_dtype(d.weight.scale.dtype).itemsize
        if d.weight.zero is not None:
            total += d.n * d.groups * bits // 8
        return total

    @classmethod
    def hardware_tested(cls, platform: Platform, variant: str = "") -> bool:
        return False

    @classmethod
    def prepared_bytes(cls, descriptor: CompressedLinearDescriptor) -> int | None:
        d = descriptor
        total = cls._weight_bytes(d) + small_bytes(d, None) + 4 * native.MARLIN_WORKSPACE
        return total + (4 << _CODEBOOK_BITS if d.weight.element.codebook else 0)

    @classmethod
    def layout_version(
        cls, descriptor: CompressedLinearDescriptor, platform: Platform
    ) -> str | None:
        return "marlin-1"

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        d, device = self.descriptor, weights.device
        tensors = packing.prepare(weights, d)
        if d.weight.element.codebook:
            tensors["codebook"] = d.weight.element.table().to(device)
        tensors["workspace"] = torch.zeros(
            native.MARLIN_WORKSPACE, dtype=torch.int32, device=device
        )
        return tensors

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        d = self.descriptor
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        out = torch.ops.compressed_linear.marlin_gemm(
            rows,
            tensors["weight"],
            tensors["scale"],
            tensors.get("zero"),
            tensors.get("codebook"),
            tensors.get("order"),
            tensors.get("row_scale"),
            bias,
            tensors["workspace"],
            d.n,
            d.k,
            d.group_size,
            self.element,
            self.element_bias,
            self.output_dtype,
        )
        return out if x.dim() == 2 else out.reshape(*x.shape[:-1], d.n)


def _kernel_element(element: ElementType) -> str:
    if element.codebook:
        return f"codebook{element.bits}"
    return element.name if element.kind == "float" else f"uint{element.bits}"


def _rounded(d: CompressedLinearDescriptor) -> torch.Tensor:
    """The codebook in the dtype of x, in which the kernel multiplies."""
    return d.weight.element.table().to(torch_dtype(d.input_dtype))
