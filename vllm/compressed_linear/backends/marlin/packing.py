# SPDX-License-Identifier: Apache-2.0
"""Repack a checkpoint's tensors into Marlin's layout (``csrc/layouts/marlin.h``).

The layout is that of vLLM's Marlin kernels for 16-bit activations: tests compare every tensor with
vLLM's own packers. It supports codes of 4 and 8 bits, N a multiple of 64 and K of 16; nothing is
padded, so a backend declines other shapes.

Weights on a GPU are repacked there if the CUDA kernels are built, else on the CPU. The CUDA kernels
have been run by an emulator only, never on hardware.
"""

from __future__ import annotations

import torch

from vllm.compressed_linear.backends.shared.repack import CodeLocation, CodeWriter, write_codes
from vllm.compressed_linear.backends.shared.side_tensors import small_tensors
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import ElementType, torch_dtype

TILE_N = 64
"""Output channels come in multiples of this."""
STRIP_K = 16
"""Input channels come in multiples of this."""

_WORD_BITS = 32


def weight_words(descriptor: CompressedLinearDescriptor) -> tuple[int, int]:
    """Shape of the int32 tensor of codes: [K / 16, N · 16 / codes per word]."""
    d = descriptor
    return d.k // STRIP_K, d.n * STRIP_K * d.weight.element.bits // _WORD_BITS


def prepare(
    weights: CompressedWeights, descriptor: CompressedLinearDescriptor
) -> dict[str, torch.Tensor]:
    """The tensors of a layer in Marlin's layout, on the device of ``weights``.

    * ``weight`` int32 [K/16, N·bits/2]: the codes, unchanged
    * ``scale`` [G, N] in the checkpoint's dtype (uint8 for e8m0), in the columns that
      ``scale_columns`` names
    * ``zero``: integer zero points int32 [G, N·bits/32], others [G, N] in grouped columns
    * ``order`` int32 [K]: channel of x of each of the kernel's, −1 for a channel of zeros
    * ``row_scale`` float32 [N], ``prescale`` float32 [K], ``input_scale`` float32 [1] and
      ``input_zero`` int32 [1]: in plain order

    Only ``weight`` is always there. Raises ``ValueError`` for shapes and elements that the layout
    does not support, and for integer zero points of more bits than the codes have.
    """
    native.load()
    d = descriptor
    device = weights.device
    if device.type != "cpu" and (device.type != "cuda" or native.cuda_available() is not None):
        device = torch.device("cpu")
    words = torch.empty(weight_words(d), dtype=torch.int32, device=device)
    write_codes(_writer(words, d), weights, d, kernel_element(d.weight.element))
    tensors = {"weight": words}
    scale, zero = weights.scales(0, d.n)
    ops = torch.ops.compressed_linear
    if d.weight.scale is not None and scale is not None:
        tensors["scale"] = ops.marlin_scales(scale.to(device), scale_columns(d))
    if d.weight.zero is not None and zero is not None:
        zero = zero.to(device)
        tensors["zero"] = (
            ops.marlin_zeros(zero, d.weight.element.bits)
            if d.weight.zero.kind == "integer"
            else ops.marlin_scales(zero, "grouped")
        )
    small = small_tensors(weights, d.activation)
    if "perm" in small:
        tensors["order"] = small.pop("perm")
    return {name: values.to(weights.device) for name, values in (tensors | small).items()}


def _writer(words: torch.Tensor, descriptor: CompressedLinearDescriptor) -> CodeWriter:
    ops, n, k = torch.ops.compressed_linear, descriptor.n, descriptor.k
    element = kernel_element(descriptor.weight.element)

    def located(at: CodeLocation, rows: int, blank: int, blank_code: int, row_start: int) -> None:
        where = at.to(words.device).arguments
        ops.repack_codes("marlin", words, *where, rows, blank, blank_code, row_start, n, k, element)

    def standard(codes: torch.Tensor, row_start: int) -> None:
        ops.pack_rows("marlin", words, codes.to(words.device), row_start, n, k, element)

    return CodeWriter(located, standard)


def kernel_element(element: ElementType) -> str:
    """Name of ``element`` for the repacking ops, where small floats and codebooks are indices."""
    return element.name if element.kind == "float" and element.bits == 8 else f"uint{element.bits}"


def scale_columns(descriptor: CompressedLinearDescriptor) -> str:
    """Name of the column order of a layer's scales for ``marlin_scales``."""
    d = descriptor
    if d.groups == 1:
        return "channel"
    small = d.weight.scale is not None and torch_dtype(d.weight.scale.dtype).itemsize == 1
    return "byte" if small else "grouped"
