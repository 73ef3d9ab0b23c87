# SPDX-License-Identifier: Apache-2.0
"""Packed layout of the Triton kernel: output channels innermost, so that adjacent lanes read
adjacent words.

Codes are bit planes of 8, 4, 2 and 1 bits, as many as the width of a code has ones in binary. A
plane is int32 [k / fields, N]: a word has ``32 / width`` consecutive input channels, lowest bits
first. The planes of a weight follow each other along the first axis, that of the lowest bits first.
Scales and zero points are [G, N]. N is padded to a multiple of ``COLUMN_MULTIPLE``.
"""

from __future__ import annotations

import torch

from vllm.compressed_linear.backends.triton.spec import COLUMN_MULTIPLE, WORD_BITS, KernelSpec
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype


def columns(n: int) -> int:
    """N, padded."""
    return -(-n // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def packed_rows(spec: KernelSpec) -> int:
    """Words that hold one output channel."""
    return spec.k_filled * spec.bits // WORD_BITS


def scale_dtype(d: CompressedLinearDescriptor) -> torch.dtype | None:
    """Dtype of prepared scales: the checkpoint's; 8-bit floats as bytes."""
    if d.weight.scale is None:
        return None
    dtype = torch_dtype(d.weight.scale.dtype)
    return torch.uint8 if dtype == torch.float8_e4m3fn else dtype


def zero_dtype(d: CompressedLinearDescriptor) -> torch.dtype | None:
    """Dtype of prepared zero points."""
    zero = d.weight.zero
    if zero is None:
        return None
    # Integer zero points are at most 2^bits, which is exact in bfloat16.
    return torch.bfloat16 if zero.kind == "integer" else torch_dtype(zero.dtype)


def pack_codes(codes: torch.Tensor, spec: KernelSpec) -> torch.Tensor:
    """uint8 [rows, K] → int32 [words, rows]; channels that fill up get code 0."""
    segments = codes.unflatten(1, (-1, spec.segment))
    missing = spec.filled - spec.segment
    filled = torch.nn.functional.pad(segments, (0, missing)).flatten(1)
    parts, below = [], 0
    for width in spec.planes:
        fields = ((filled >> below) & ((1 << width) - 1)).unflatten(1, (-1, WORD_BITS // width))
        words = torch.zeros(fields.shape[:2], dtype=torch.int32, device=codes.device)
        for place in range(WORD_BITS // width):
            words |= fields[..., place].to(torch.int32) << (place * width)
        parts.append(words)
        below += width
    return torch.cat(parts, 1).t()


def pack_weights(
    weights: CompressedWeights, d: CompressedLinearDescriptor, spec: KernelSpec
) -> dict[str, torch.Tensor]:
    """``packed``, and ``scale`` and ``zero`` where there are any, on the device of the weights."""
    wide, device = columns(d.n), weights.device
    tensors = {"packed": torch.zeros(packed_rows(spec), wide, dtype=torch.int32, device=device)}
    for name, dtype in (("scale", scale_dtype(d)), ("zero", zero_dtype(d))):
        if dtype is not None:
            tensors[name] = torch.zeros(d.groups, wide, dtype=dtype, device=device)
    for start, stop in weights.chunks():
        rows = weights.rows(start, stop)
        tensors["packed"][:, start:stop] = pack_codes(rows.codes, spec)
        for name, values in (("scale", rows.scale), ("zero", rows.zero)):
            if values is not None:
                target = tensors[name]
                bytewise = target.dtype == torch.uint8
                target[:, start:stop] = (values.view(torch.uint8) if bytewise else values).t()
    return tensors
