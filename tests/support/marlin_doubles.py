# SPDX-License-Identifier: Apache-2.0
"""Marlin's and Machete's operators of vLLM's CUDA wheel in plain torch.

The layout of Marlin's tiles is undone by inverting vLLM's own Python packers, so numbers that come
out right went in right.
"""

from __future__ import annotations

import functools

import torch

from tests.support.cuda_checks import expect, on, unreal
from vllm.compressed_linear.spec.elements import E2M1, E4M3
from vllm.compressed_linear.spec.packing import Packing, unpack

TILE = 16


@functools.cache
def _weight_order(bits: int) -> torch.Tensor:
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import get_weight_perm

    order: torch.Tensor = get_weight_perm(bits)
    return order


def gptq_marlin_repack(
    b_q_weight: torch.Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool
) -> torch.Tensor:
    """int32 [K·bits/32, N] → Marlin's tiles, by the packer of vLLM's tests."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_weights

    factor = 32 // num_bits
    expect(num_bits in (4, 8), f"num_bits {num_bits}")
    expect(b_q_weight.dtype == torch.int32, f"dtype {b_q_weight.dtype}")
    expect(b_q_weight.is_contiguous(), "not contiguous")
    expect(b_q_weight.shape == (size_k // factor, size_n), f"shape {b_q_weight.shape}")
    expect(size_k % TILE == 0 and size_n % 64 == 0, f"K={size_k} N={size_n} are no whole tiles")
    shape = (size_k // TILE, size_n * TILE // factor)
    if unreal(b_q_weight):
        return b_q_weight.new_empty(shape)
    codes = unpack(b_q_weight, Packing(num_bits, "K"), size_k, 0)
    packed: torch.Tensor = marlin_weights(
        codes.to(torch.int32), size_k, size_n, num_bits, _weight_order(num_bits)
    )
    return packed


def _codes(packed: torch.Tensor, k: int, n: int, bits: int) -> torch.Tensor:
    """The inverse of ``gptq_marlin_repack``: uint8 [K, N]."""
    factor = 32 // bits
    fields = [(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(factor)]
    flat = torch.stack(fields, -1).reshape(-1, _weight_order(bits).numel())
    plain = torch.empty_like(flat)
    plain[:, _weight_order(bits)] = flat
    tiles = plain.reshape(k // TILE, n // TILE, TILE, TILE).permute(0, 2, 1, 3)
    return tiles.reshape(k, n).to(torch.uint8)


def _orders() -> tuple[torch.Tensor, torch.Tensor]:
    from vllm.model_executor.layers.quantization.utils.marlin_utils import get_scale_perms

    grouped, single = get_scale_perms()
    return torch.tensor(grouped), torch.tensor(single)


def _unpermuted(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    flat = values.reshape(-1, len(order))
    plain = torch.empty_like(flat)
    plain[:, order] = flat
    return plain.reshape(values.shape)


def marlin_gemm(
    a: torch.Tensor,
    c_or_none: torch.Tensor | None,
    b_q_weight: torch.Tensor,
    b_bias_or_none: torch.Tensor | None,
    b_scales: torch.Tensor,
    a_scales: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    b_zeros_or_none: torch.Tensor | None,
    workspace: torch.Tensor,
    b_type_id: int,
    size_m: int,
    size_n: int,
    size_k: int,
    use_atomic_add: bool,
    use_fp32_reduce: bool,
    is_zp_float: bool,
) -> torch.Tensor:
    from vllm.scalar_type import scalar_types as types

    names = ("uint4", "uint4b8", "uint8b128", "float8_e4m3fn", "float4_e2m1f")
    known = {getattr(types, name).id: name for name in names}
    expect(b_type_id in known, f"weight type {b_type_id}")
    kind = known[b_type_id]
    bits = 8 if "8" in kind.replace("b8", "") else 4
    on(a.device, b_q_weight, b_scales, global_scale, b_zeros_or_none, workspace)
    expect(a.dtype in (torch.float16, torch.bfloat16), f"activations {a.dtype}")
    expect(a.shape == (size_m, size_k) and a.stride(1) == 1, f"a {a.shape} {a.stride()}")
    expect(
        b_q_weight.shape == (size_k // TILE, size_n * TILE * bits // 32)
        and b_q_weight.dtype == torch.int32
        and b_q_weight.is_contiguous(),
        f"weights {b_q_weight.shape} {b_q_weight.dtype}",
    )
    expect(
        (size_n % 64 == 0 and size_k % 128 == 0) or (size_n % 128 == 0 and size_k % 64 == 0),
        f"N={size_n} K={size_k} fit no tile of threads",
    )
    expect(workspace.dtype == torch.int32 and workspace.numel() > 0, "workspace")
    expect(b_scales.is_contiguous() and b_scales.shape[1] == size_n, f"scales {b_scales.shape}")
    groups = b_scales.shape[0]
    group = size_k // groups
    scale_dtypes = {
        torch.float8_e4m3fn: {16},
        torch.float8_e8m0fnu: {32},
        a.dtype: {-1, 128} if kind == "float8_e4m3fn" else {-1, 32, 64, 128},
    }
    expect(b_scales.dtype in scale_dtypes, f"scales {b_scales.dtype} with {a.dtype}")
    expect(
        (-1 if groups == 1 else group) in scale_dtypes[b_scales.dtype],
        f"groups of {group} with scales {b_scales.dtype}",
    )
    if b_scales.dtype == torch.float8_e8m0fnu:
        expect(a.dtype == torch.bfloat16, f"e8m0 scales with {a.dtype}")
    nvfp4 = b_scales.dtype == torch.float8_e4m3fn
    expect(nvfp4 == (global_scale is not None), "a global scale exactly for NVFP4")
    expect(global_scale is None or global_scale.dtype == torch.float32, "global scale")
    zeros = b_zeros_or_none if b_zeros_or_none is not None and b_zeros_or_none.numel() else None
    expect((zeros is not None) == (kind == "uint4"), f"zero points with {kind}")
    if zeros is not None:
        expect(zeros.shape == (groups, size_n * bits // 32), f"zero points {zeros.shape}")
        expect(zeros.dtype == torch.int32 and zeros.is_contiguous(), "zero points")
    if unreal(a):
        return a.new_empty(size_m, size_n)
    codes = _codes(b_q_weight, size_k, size_n, bits)
    scale = _scales(b_scales, size_n, single=groups == 1 and b_scales.dtype == a.dtype)
    if kind == "float8_e4m3fn":
        # The kernel leaves out the exponent's bias; scales of 16 bits make up for it.
        bias = (
            0 if b_scales.dtype == torch.float8_e8m0fnu else 120 if a.dtype == torch.bfloat16 else 8
        )
        values = E4M3.decode(codes).double() * 2.0**-bias
    elif kind == "float4_e2m1f":
        values = E2M1.decode(codes).double()
    elif zeros is not None:
        values = codes.double() - _zeros(zeros, size_n).repeat_interleave(group, 0)
    else:
        values = codes.double() - (1 << (bits - 1))
    weight = values * scale.repeat_interleave(group, 0)
    if global_scale is not None:
        # As above, for two of its three factors.
        weight = weight * global_scale.double() * 2.0 ** -(126 if a.dtype == torch.bfloat16 else 14)
    rounded = weight.to(a.dtype) if groups > 1 and not nvfp4 else weight
    return (a.double() @ rounded.double()).to(a.dtype)


def _scales(scales: torch.Tensor, n: int, *, single: bool) -> torch.Tensor:
    """Scales [G, N] in the order of output channels, float64."""
    grouped_order, single_order = _orders()
    if scales.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        quads = scales.view(torch.uint8).reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(scales.shape)
        if scales.dtype == torch.float8_e4m3fn:
            # Without a sign, five bits of exponent: the upper bits of an fp16.
            wide = (quads.to(torch.int16) << 7).view(torch.float16).double()
        else:
            wide = torch.exp2(quads.double() - 127)
        return _unpermuted(wide, grouped_order)
    return _unpermuted(scales.double(), single_order if single else grouped_order)


def _zeros(packed: torch.Tensor, n: int) -> torch.Tensor:
    fields = [(packed >> (4 * i)) & 15 for i in range(8)]
    flat = torch.stack(fields, -1).reshape(-1, 8)
    plain = torch.empty_like(flat)
    plain[:, torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])] = flat
    return _unpermuted(plain.reshape(-1, n), _orders()[0]).double()


def machete_prepack(
    b: torch.Tensor, a_type: torch.dtype, b_type: int, group_scales_type: torch.dtype | None
) -> torch.Tensor:
    """Not the order of a GPU's tiles, which no Python code of vLLM has: stays as it came."""
    expect(b.dtype == torch.int32 and b.stride(0) == 1, f"weights {b.dtype} {b.stride()}")
    expect(a_type in (torch.float16, torch.bfloat16) and a_type == group_scales_type, "types")
    return b.contiguous()


def machete_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    b_type: int,
    out_type: torch.dtype | None,
    group_scales: torch.Tensor | None,
    group_zeros: torch.Tensor | None,
    group_size: int | None,
    channel_scales: torch.Tensor | None,
    token_scales: torch.Tensor | None,
    schedule: str | None,
) -> torch.Tensor:
    from vllm.scalar_type import scalar_types as types

    bits = {types.uint4b8.id: 4, types.uint8b128.id: 8}
    expect(b_type in bits, f"weight type {b_type}")
    k, n = a.shape[1], b.shape[1]
    expect(a.is_contiguous() and b.is_contiguous(), "layout of the operands")
    expect(b.shape[0] == k * bits[b_type] // 32, f"weights {b.shape} for K={k}")
    expect(k % 64 == 0 and n % 128 == 0, f"K={k} N={n} are no whole tiles")
    expect(group_scales is not None and group_scales.dtype == a.dtype, "scales")
    assert group_scales is not None
    group = k // group_scales.shape[0]
    expect(group_scales.shape == (k // group, n), f"scales {group_scales.shape}")
    expect(group_scales.is_contiguous(), "scales are not contiguous")
    expect(group_size in (group, -1) and group_zeros is None, "groups")
    expect(group in (64, 128, k), f"groups of {group}")
    on(a.device, b, group_scales)
    if unreal(a):
        return a.new_empty(a.shape[0], n)
    codes = unpack(b, Packing(bits[b_type], "K"), k, 0).double() - (1 << (bits[b_type] - 1))
    weight = (codes * group_scales.double().repeat_interleave(group, 0)).to(a.dtype)
    return (a.double() @ weight.double()).to(a.dtype)
