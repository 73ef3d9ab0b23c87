# SPDX-License-Identifier: Apache-2.0
"""Codes and scales of weights, by the specifications of the number formats, in plain torch.

Weights are fp32 [N, K]. All functions work on meta tensors too, for headers alone. They import
nothing of the package: they are what its readers are compared with.

Sources: OCP 8-bit floating point specification 1.0; OCP Microscaling Formats specification 1.0
(E2M1, E8M0, section 6.3); NVFP4 as compressed-tensors and ModelOpt write it; GPTQ and AWQ as
AutoGPTQ and AutoAWQ pack.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0


def blocks(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[⌈N/rows⌉, ⌈K/columns⌉]: the largest magnitude of each block; the last ones may be short."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -k % columns, 0, -n % rows))
    return padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax((1, 3))


def spread(scale: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    """The scale of each block repeated for its elements, [N, K]."""
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def nonzero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """uint8 codes, sign in bit 3, of the nearest values; ties to the even code; saturating."""
    values = torch.tensor(E2M1_VALUES, device=x.device)
    middle = (values[1:] + values[:-1]) / 2
    magnitude = x.abs().unsqueeze(-1)
    # Between codes i and i + 1: above the middle, or on it if i is odd.
    odd = torch.arange(7, device=x.device) % 2 == 1
    up = (magnitude > middle) | ((magnitude == middle) & odd)
    return up.sum(-1).to(torch.uint8) | ((x < 0).to(torch.uint8) << 3)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], device=codes.device)
    return table[codes.long()]


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[N, K] codes → uint8 [N, K/2], even elements in the low half."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def e8m0_exponents(largest: torch.Tensor, maximum_exponent: int) -> torch.Tensor:
    """uint8: the exponent of the largest magnitude less that of the type's largest, biased."""
    exponent = torch.floor(torch.log2(nonzero(largest))) - maximum_exponent
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8)


def e8m0_values(exponents: torch.Tensor) -> torch.Tensor:
    return torch.exp2(exponents.to(torch.float32) - 127)


def integers(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K], scale fp16 [N, G], zero uint8 [N, G]) rounded to nearest.

    ŵ = scale · (code − zero). ``group`` −1 is all of K.
    """
    k = weight.shape[1]
    size = k if group == -1 else group
    grouped = torch.nn.functional.pad(weight, (0, -k % size)).unflatten(1, (-1, size))
    top = (1 << bits) - 1
    if symmetric:
        scale = nonzero(grouped.abs().amax(2) / max((1 << (bits - 1)) - 1, 1)).half().float()
        zero = torch.full_like(scale, 1 << (bits - 1))
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = nonzero((high - low) / top).half().float()
        zero = (-low / scale).round().clamp(0, top)
    codes = (grouped / scale.unsqueeze(2)).round() + zero.unsqueeze(2)
    codes = codes.clamp(0, top).flatten(1)[:, :k]
    return codes.to(torch.uint8), scale.half(), zero.to(torch.uint8)


def meaning(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int
) -> torch.Tensor:
    """fp32 [N, K] of ``integers``."""
    size = codes.shape[1] if group == -1 else group

    def each(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.float().repeat_interleave(size, 1)[:, : codes.shape[1]]

    return each(scale) * (codes.float() - each(zero))


def words(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 words along ``dim``: a stream of codes of ``bits`` bits, the first in the lowest bits,
    for 2, 3, 4 and 8 bits, filled up with zeros."""
    values = codes.movedim(dim, -1).to(torch.int64)
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % 32))
    bit = torch.arange(bits, device=codes.device)
    stream = ((values.unsqueeze(-1) >> bit) & 1).flatten(-2).unflatten(-1, (-1, 32))
    packed = (stream << torch.arange(32, device=codes.device)).sum(-1)
    kept = -(-codes.shape[dim] * bits // 32)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)[..., :kept]
    return packed.to(torch.int32).movedim(-1, dim).contiguous()
