# SPDX-License-Identifier: Apache-2.0
"""fp8 weights with a scale for each block of 128×128 (DeepSeek, Qwen), x in fp8 by groups of 128.

What the classes do not say, found by reading vLLM 0.32 and its operators:

* x is quantized by one operator for CUTLASS and Triton: max|x| falls on 448, and a group's scale is
  never below 10⁻¹⁰ / 448, so smaller groups are coarser
* sums of a block are scaled and added up in fp32; within one, tensor cores add 32 products at a
  time as in ``scaled_mm``
* CUTLASS reads scales of blocks only where N is a multiple of 16: vLLM calls a Triton kernel else,
  which takes them for others
* Triton has no e4m3 before compute capability 8.9
* DeepGEMM rounds scales to powers of two and quantizes the weights anew, unless
  ``VLLM_USE_DEEP_GEMM_E8M0=0``; DeepGEMM's package decides the layout of scales either way
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vllm.compressed_linear.backends.vllm_native.adapter import (
    KernelAdapter,
    add_parameter,
    byte_codes,
    scales,
)
from vllm.compressed_linear.backends.vllm_native.classes import scaled_mm
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype, widen_scale

BLOCK = 128
KINDS = frozenset({"e4m3 dynamic per group"})
"""Kinds of activations, in our words, that these classes are for."""
POWERS_OF_TWO = "e4m3 dynamic per group with e8m0 scales"
"""The kind that only DeepGEMM has of them."""

_MAXIMUM = 448.0


@dataclass(frozen=True, kw_only=True)
class Fp8Blocks(KernelAdapter):
    """One of vLLM's subclasses of ``Fp8BlockScaledMMLinearKernel``, or another class of the same
    table. ``never``: why it cannot keep the numerical contract at all; ``multiple``: of N.
    """

    never: str = ""
    multiple: int = 1
    arithmetic: str = "fp8"

    family = "fp8 blocks"
    scale_dtypes = frozenset({"bfloat16", "float16", "float32", "e8m0"})

    def reasons(self, d: CompressedLinearDescriptor) -> Iterable[str]:
        scale, activation = d.weight.scale, d.activation
        if self.never:
            yield self.never
        if scale is None:
            yield "weights without scales"
        elif (scale.granularity, scale.block_rows, d.group_size) != ("block", BLOCK, BLOCK):
            found = f"a scale for each row in groups of {d.group_size}"
            if scale.granularity == "block":
                found = f"blocks of {scale.block_rows}x{d.group_size}"
            yield f"{found} (supported: blocks of {BLOCK}x{BLOCK})"
        if d.n % self.multiple:
            yield f"N={d.n} (supported: multiples of {self.multiple})"
        if activation is None:
            yield "it quantizes x, which the descriptor does not"
            return
        if activation.group_size != BLOCK:
            yield f"x in groups of {activation.group_size} (supported: {BLOCK})"
        if activation.scale_dtype != "float32":
            yield f"scales of x as {activation.scale_dtype} (supported: float32)"
        elif activation.maximum != _MAXIMUM:
            yield f"max|x| falls on {_MAXIMUM:g}, the descriptor has {activation.maximum:g}"

    def config(self, d: CompressedLinearDescriptor) -> object:
        dtype = torch_dtype(d.input_dtype)
        return scaled_mm.fp8_config(d.n, d.k, dtype, weight="block", activation="dynamic group")

    def build(self, kernel: Any, d: CompressedLinearDescriptor) -> Any:
        return kernel(self.config(d))

    def layer(self, d: CompressedLinearDescriptor, weights: CompressedWeights) -> torch.nn.Module:
        layer = torch.nn.Module()
        add_parameter(layer, "weight", byte_codes(d, weights).view(torch.float8_e4m3fn))
        scale = widen_scale(scales(d, weights)[::BLOCK]).contiguous()
        add_parameter(layer, "weight_scale", scale)
        return layer

    def prepared_bytes(self, d: CompressedLinearDescriptor) -> int:
        return d.n * d.k + 4 * -(-d.n // BLOCK) * d.groups

    def weight_rounding(self, d: CompressedLinearDescriptor) -> float:
        return float((BLOCK / 32) ** 0.5 * 2.0**-13)


_QUANTISE_X = "_C::per_token_group_fp8_quant"

KERNELS = (
    Fp8Blocks(
        kernel="FlashInferFp8DeepGEMMDynamicBlockScaledKernel",
        tag="flashinferfp8block",
        never="x is quantized within FlashInfer up to 31 tokens, and by DeepGEMM's rule from 32 on",
    ),
    Fp8Blocks(
        kernel="DeepGemmFp8BlockScaledMMKernel",
        tag="deepgemmfp8block",
        never=(
            "it rounds scales to powers of two and quantizes the weights anew; without that "
            "(VLLM_USE_DEEP_GEMM_E8M0=0) it is not wired to descriptors"
        ),
    ),
    Fp8Blocks(
        kernel="CutlassFp8BlockScaledMMKernel",
        tag="cutlassfp8block",
        ops=(_QUANTISE_X, "_C::cutlass_scaled_mm"),
        multiple=16,
        efficiency=0.6,
    ),
    Fp8Blocks(
        kernel="MarlinFP8ScaledMMLinearKernel",
        tag="marlinfp8block",
        never="it takes x as it is, which the descriptor does not",
    ),
    Fp8Blocks(
        kernel="TritonFp8BlockScaledMMKernel",
        tag="tritonfp8block",
        ops=(_QUANTISE_X,),
        min_capability=89,
        efficiency=0.4,
    ),
)
"""In vLLM's order; what is not wired is in ``declined.py``."""
