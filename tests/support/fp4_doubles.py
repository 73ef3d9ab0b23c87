# SPDX-License-Identifier: Apache-2.0
"""The operators of vLLM's CUDA wheel for NVFP4, and ``torch._scaled_mm`` as it is on CUDA, in plain
torch with checks of what they are given.

Where scales lie in tiles of 128 by 4 is computed from the formula in NVIDIA's documentation of
cuBLAS ("Block scaling factors layout"), not from vLLM's code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.support.cuda_checks import expect, on, unreal
from vllm.compressed_linear.spec.elements import E2M1

GROUP = 16
MULTIPLE = 32


def place(rows: int, groups: int) -> torch.Tensor:
    """int64 [rows, groups]: where the scale of each group of each row lies in its tiles."""
    row, group = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
    tile = row // 128 * (_up(groups, 4) // 4) + group // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _nearest(values: torch.Tensor) -> torch.Tensor:
    """fp32 → codes of e2m1, ties to the even one, saturating."""
    between = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    low = torch.bucketize(values.abs(), between)
    high = torch.bucketize(values.abs(), between, right=True)
    code = torch.where(low % 2 == 0, low, high).to(torch.uint8)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def scaled_fp4_quant(
    x: torch.Tensor,
    input_scale: torch.Tensor,
    is_sf_swizzled_layout: bool,
    *,
    output: torch.Tensor,
    output_scale: torch.Tensor,
) -> None:
    m, k = x.shape
    filled = 2 * output.shape[1]
    expect(x.is_contiguous() and x.dtype in (torch.float16, torch.bfloat16), f"x {x.dtype}")
    expect(k % GROUP == 0 and filled % GROUP == 0 and filled >= k, f"K={k} in {filled}")
    expect(output.shape[0] == m and output.dtype == torch.uint8, f"output {output.shape}")
    tiles = (_up(m, 128), _up(filled // GROUP, 4) // 4)
    expect(is_sf_swizzled_layout, "scales that are not in tiles")
    expect(output_scale.shape == tiles and output_scale.dtype == torch.int32, "output_scale")
    expect(input_scale.numel() == 1 and input_scale.dtype == torch.float32, "input_scale")
    on(x.device, input_scale, output, output_scale)
    if unreal(x):
        return
    groups = x.float().unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1)
    sixth = 1 / torch.tensor(6.0)
    scale = (input_scale * (largest * sixth)).clamp(max=448).to(torch.float8_e4m3fn)
    wide = scale.float()
    inverse = torch.where(wide == 0, 0, 1 / (wide * (1 / input_scale)))
    codes = _nearest(groups * inverse.unsqueeze(-1)).flatten(1)
    output.zero_()
    output[:, : k // 2] = codes[:, ::2] | codes[:, 1::2] << 4
    flat = output_scale.zero_().view(torch.uint8).flatten()
    flat[place(m, filled // GROUP)[:, : k // GROUP]] = scale.view(torch.uint8)


def _dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float64 [rows, K] of packed codes uint8 [rows, K/2] and scales e4m3 in tiles."""
    rows, half = codes.shape
    values = E2M1.decode(torch.stack((codes & 15, codes >> 4), -1).flatten(1)).double()
    own = scale.flatten()[place(rows, half * 2 // GROUP)].double()
    return values * own.repeat_interleave(GROUP, 1)


def _operands(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor
) -> None:
    k = 2 * a.shape[1]
    expect(a.dtype == b.dtype == torch.uint8, f"codes {a.dtype} {b.dtype}")
    expect(a.is_contiguous() and b.is_contiguous(), "codes are not contiguous")
    expect(b.shape[1] * 2 == k, f"K={k} of x, {b.shape[1] * 2} of the weight")
    expect(k % MULTIPLE == 0 and b.shape[0] % MULTIPLE == 0, f"N={b.shape[0]} K={k}")
    for codes, scale in ((a, scale_a), (b, scale_b)):
        expect(scale.dtype == torch.float8_e4m3fn and scale.is_contiguous(), "scales")
        count = _up(codes.shape[0], 128) * _up(k // GROUP, 4)
        expect(scale.numel() == count, f"{scale.numel()} scales, expected {count}")
        expect(unreal(scale) or not bool(torch.signbit(scale.float()).any()), "a negative scale")
    on(a.device, b, scale_a, scale_b)


def cutlass_scaled_fp4_mm(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    block_scale_a: torch.Tensor,
    block_scale_b: torch.Tensor,
    alpha: torch.Tensor,
) -> None:
    _operands(a, b, block_scale_a, block_scale_b)
    rows = _up(a.shape[0], 128), _up(b.shape[0], 128)
    expect((block_scale_a.shape[0], block_scale_b.shape[0]) == rows, "rows of the scales")
    expect(alpha.numel() == 1 and alpha.dtype == torch.float32, f"alpha {alpha.dtype}")
    expect(out.dtype in (torch.float16, torch.bfloat16), f"out {out.dtype}")
    expect(out.shape == (a.shape[0], b.shape[0]), f"out {out.shape}")
    on(out.device, a, alpha)
    if not unreal(a):
        product = _dequantized(a, block_scale_a) @ _dequantized(b, block_scale_b).t()
        out.copy_(product * alpha.double())


IMPLEMENTED: dict[str, Callable[..., Any]] = {
    "scaled_fp4_quant.out": scaled_fp4_quant,
    "cutlass_scaled_fp4_mm": cutlass_scaled_fp4_mm,
}


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``torch._scaled_mm`` for scales of whole tensors, and for NVFP4."""
    expect(a.is_contiguous() and b.stride(0) == 1, f"strides {a.stride()} {b.stride()}")
    expect(bias is None and out_dtype in (torch.bfloat16, torch.float32), f"out {out_dtype}")
    shape = (a.shape[0], b.shape[1])
    on(a.device, b, scale_a, scale_b)
    if a.dtype == torch.float4_e2m1fn_x2:
        codes = a.view(torch.uint8), b.t().view(torch.uint8)
        _operands(*codes, scale_a, scale_b)
        if unreal(a):
            return torch.empty(shape, dtype=out_dtype, device=a.device)
        product = _dequantized(codes[0], scale_a) @ _dequantized(codes[1], scale_b).t()
        return product.to(out_dtype)
    expect(a.dtype == b.dtype == torch.float8_e4m3fn, f"{a.dtype} with {b.dtype}")
    expect(b.shape[0] % 16 == 0 and b.shape[1] % 16 == 0, f"b {b.shape}")
    for scale in (scale_a, scale_b):
        expect(scale.shape == (1,) and scale.dtype == torch.float32, f"scale {scale.shape}")
    if unreal(a):
        return torch.empty(shape, dtype=out_dtype, device=a.device)
    # Rows that nobody filled in may hold what is no number.
    return ((a.double() @ b.double()) * scale_a.double() * scale_b.double()).to(out_dtype)
