# SPDX-License-Identifier: Apache-2.0
"""Operators of vLLM's CUDA wheel that quantize activations and multiply 8-bit operands, in plain
torch."""

from __future__ import annotations

import torch

from tests.support.cuda_checks import expect, on, unreal


def dynamic_scaled_int8_quant(
    out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor | None
) -> None:
    expect(out.dtype == torch.int8 and out.shape == x.shape, f"out {out.shape} {out.dtype}")
    expect(scale.shape == (x.shape[0], 1) and scale.dtype == torch.float32, "scale")
    expect(x.is_contiguous() and azp is None, "x")
    if unreal(x):
        return
    largest = x.float().abs().amax(1, keepdim=True)
    scale.copy_(largest / 127)
    inverse = torch.where(largest == 0, 0, 127 / largest)
    out.copy_(torch.round(x.float() * inverse).clamp(-128, 127))


def static_scaled_int8_quant(
    out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor | None
) -> None:
    expect(out.dtype == torch.int8 and out.shape == x.shape, f"out {out.shape} {out.dtype}")
    expect(scale.numel() == 1 and scale.dtype == torch.float32 and x.is_contiguous(), "scale")
    expect(azp is None or (azp.numel() == 1 and azp.dtype == torch.int32), "zero point")
    if unreal(x):
        return
    added = 0 if azp is None else azp
    out.copy_((torch.round(x.float() * (1 / scale)) + added).clamp(-128, 127))


def _fp8_output(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The rows of ``out`` that x fills: it may have more, which the operators leave as they are."""
    expect(out.dtype == torch.float8_e4m3fn and out.is_contiguous(), f"out {out.dtype}")
    expect(out.shape[0] >= x.shape[0] and out.shape[1] == x.shape[1], f"out {out.shape}")
    return out[: x.shape[0]]


def dynamic_per_token_scaled_fp8_quant(
    out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, scale_ub: torch.Tensor | None
) -> None:
    held = _fp8_output(out, x)
    expect(scale.shape == (out.shape[0], 1) and scale.dtype == torch.float32, "scale")
    expect(x.stride(-1) == 1 and scale_ub is None, "x")
    if unreal(x):
        return
    own = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    scale[: x.shape[0]] = own
    held.copy_((x.float() * (1 / own)).clamp(-448, 448).to(out.dtype))


def dynamic_scaled_fp8_quant(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    held = _fp8_output(out, x)
    expect(scale.numel() == 1 and scale.dtype == torch.float32, "scale")
    if unreal(x):
        return
    scale.copy_(x.float().abs().max().reshape(1) / 448)
    held.copy_((x.float() * (1 / scale)).clamp(-448, 448).to(out.dtype))


def static_scaled_fp8_quant(
    out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, group_shape: list[int] | None = None
) -> None:
    held = _fp8_output(out, x)
    expect(scale.numel() == 1 and scale.dtype == torch.float32, "scale")
    if unreal(x):
        return
    held.copy_((x.float() * (1 / scale)).clamp(-448, 448).to(out.dtype))


def per_token_group_fp8_quant(
    x: torch.Tensor,
    output_q: torch.Tensor,
    output_s: torch.Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    dummy_is_scale_transposed: bool,
    dummy_is_tma_aligned: bool,
) -> None:
    m, k = x.shape
    expect(output_q.dtype == torch.float8_e4m3fn and output_q.shape == x.shape, "output_q")
    expect(x.is_contiguous() and output_q.is_contiguous(), "not contiguous")
    expect(k % group_size == 0, f"K={k} is no multiple of {group_size}")
    expect(output_s.dtype == torch.float32, f"output_s {output_s.dtype}")
    expect(output_s.shape == (m, k // group_size), f"output_s {output_s.shape}")
    expect(output_s.stride() in ((k // group_size, 1), (1, m)), f"output_s {output_s.stride()}")
    expect((fp8_min, fp8_max) == (-448.0, 448.0) and not scale_ue8m0, "another rule for scales")
    on(x.device, output_q, output_s)
    if unreal(x):
        return
    groups = x.float().unflatten(1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=eps) / fp8_max
    output_s.copy_(scale.squeeze(-1))
    output_q.copy_((groups / scale).clamp(fp8_min, fp8_max).flatten(1).to(output_q.dtype))


def block_scaled_product(
    a: torch.Tensor, b: torch.Tensor, a_scales: torch.Tensor, b_scales: torch.Tensor
) -> torch.Tensor:
    """float64 [M, N] for a [M, K] and b [N, K] with scales [M, K/128] and [N/128, K/128]."""
    n, k = b.shape
    left = a.double() * a_scales.double().repeat_interleave(128, 1)[:, :k]
    blocks = b_scales.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return left @ (b.double() * blocks).t()


def _block_operands(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """What ``cutlass_scaled_mm`` asks for where scales are neither of tokens nor of channels."""
    (m, k), n = a.shape, b.shape[1]
    groups = -(-k // 128)
    expect(a.dtype == b.dtype == torch.float8_e4m3fn, f"{a.dtype} with {b.dtype}")
    expect(a.stride(1) == 1 and out.stride(1) == 1, "a and out are not row-major")
    expect(b.stride(0) == 1 and b.stride(1) % 16 == 0, "b is not column-major, or not aligned")
    expect(out.shape == (m, n) and out.stride(0) % 16 == 0, f"out {out.shape} is not aligned")
    expect(a_scales.shape == (m, groups) and a_scales.stride() == (1, m), "a scales of 1x128")
    blocks = (groups, -(-n // 128))
    expect(b_scales.shape == blocks and b_scales.stride() == (1, groups), "b scales of 128x128")
    expect(a_scales.dtype == b_scales.dtype == torch.float32, "scales")
    expect(bias is None, "a bias")
    on(out.device, a, b, a_scales, b_scales)


def _scaled_operands(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
) -> None:
    expect(a.shape[1] == b.shape[0] and out.shape == (a.shape[0], b.shape[1]), "shapes")
    expect(a.stride(1) == 1 and out.stride(1) == 1, "a and out are not row-major")
    expect(b.stride(0) == 1, "b is not column-major")
    expect(b.stride(1) % 16 == 0 and b.shape[1] % 16 == 0, f"b {b.shape} is not aligned")
    expect(a.dtype == b.dtype, f"{a.dtype} with {b.dtype}")
    expect(out.dtype in (torch.float16, torch.bfloat16), f"out {out.dtype}")
    expect(a_scales.numel() in (1, a.shape[0]) and a_scales.dtype == torch.float32, "a scales")
    expect(b_scales.numel() in (1, b.shape[1]) and b_scales.dtype == torch.float32, "b scales")
    expect(a_scales.is_contiguous() and b_scales.is_contiguous(), "scales")
    on(out.device, a, b, a_scales, b_scales)


def cutlass_scaled_mm(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    of_tokens, of_channels = (1, a.shape[0]), (1, b.shape[1])
    if a_scales.numel() not in of_tokens or b_scales.numel() not in of_channels:
        _block_operands(out, a, b, a_scales, b_scales, bias)
        if not unreal(a):
            out.copy_(block_scaled_product(a, b.t(), a_scales, b_scales.t()))
        return
    _scaled_operands(out, a, b, a_scales, b_scales)
    if unreal(a):
        return
    product = (
        a.double() @ b.double() * a_scales.double().reshape(-1, 1) * b_scales.double().flatten()
    )
    out.copy_(product if bias is None else product + bias.double())


def cutlass_scaled_mm_azp(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    azp_adj: torch.Tensor,
    azp: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    _scaled_operands(out, a, b, a_scales, b_scales)
    expect(azp_adj.numel() == b.shape[1] and azp_adj.dtype == torch.int32, "azp_adj")
    expect(a.dtype == torch.int8 and azp is None, "a zero point for the tensor")
    if unreal(a):
        return
    sums = a.double() @ b.double() - azp_adj.double().flatten()
    out.copy_(sums * a_scales.double().reshape(-1, 1) * b_scales.double().flatten())
