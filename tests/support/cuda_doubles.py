# SPDX-License-Identifier: Apache-2.0
"""Operators of vLLM's CUDA wheel on a machine that has none: with the wheel's own schemas, checks
of what they are given, and what they compute written in plain torch.

The layout of Marlin's tiles is undone by inverting vLLM's own Python packers, so numbers that come
out right went in right.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm.compressed_linear.spec.elements import E2M1, E4M3
from vllm.compressed_linear.spec.packing import Packing, unpack

SCHEMAS: dict[str, str] = json.loads(
    (Path(__file__).parent / "data" / "vllm_cuda_ops.json").read_text()
)["schemas"]

TILE = 16
CALLED: list[str] = []
"""Names of the operators that ran, in order."""

_DEFINED: dict[str, Any] = {}


def install(functions: dict[str, Callable[..., Any]] | None = None) -> None:
    """Define what this process's vLLM does not have; each once. ``functions``: name of the operator
    → what it computes, those of this file if it is None."""
    from vllm import _custom_ops  # noqa: F401  # whatever vLLM has is there after this

    for name, function in (functions or _IMPLEMENTED).items():
        if name in _DEFINED:
            continue
        packet = name.partition(".")[0]
        known = getattr(torch.ops._C, packet, None)
        # The CPU wheel has a few names without arguments, for what it never calls.
        bare = known is not None and not known.default._schema.arguments
        if known is not None and not bare:
            continue
        home = torch.library.Library("vllm_cuda_wheel" if bare else "_C", "FRAGMENT")
        home.define(SCHEMAS[name])
        home.impl(name, _recorded(packet, function), "CompositeExplicitAutograd")
        _DEFINED[name] = home
        if bare:
            setattr(torch.ops._C, packet, getattr(torch.ops.vllm_cuda_wheel, packet))


def _recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        CALLED.append(name)
        return function(*arguments, **named)

    return run


@contextmanager
def every_call() -> Iterator[None]:
    """vLLM's wrapping custom op taken out of the way, so that ``marlin_gemm`` is reached with fake
    tensors as well."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    real = torch.ops.vllm.marlin_gemm
    torch.ops.vllm.marlin_gemm = marlin_utils._marlin_gemm
    try:
        yield
    finally:
        torch.ops.vllm.marlin_gemm = real


def expect(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(f"an operator of vLLM's CUDA wheel would refuse this: {text}")


def on(device: torch.device, *tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        expect(tensor is None or tensor.device == device, f"a tensor is not on {device}")


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


def unreal(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


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


_IMPLEMENTED: dict[str, Callable[..., Any]] = {
    "gptq_marlin_repack": gptq_marlin_repack,
    "marlin_gemm": marlin_gemm,
    "machete_prepack_B": machete_prepack,
    "machete_mm": machete_mm,
    "dynamic_scaled_int8_quant": dynamic_scaled_int8_quant,
    "static_scaled_int8_quant": static_scaled_int8_quant,
    "dynamic_per_token_scaled_fp8_quant": dynamic_per_token_scaled_fp8_quant,
    "dynamic_scaled_fp8_quant": dynamic_scaled_fp8_quant,
    "static_scaled_fp8_quant": static_scaled_fp8_quant,
    "per_token_group_fp8_quant": per_token_group_fp8_quant,
    "cutlass_scaled_mm": cutlass_scaled_mm,
    "cutlass_scaled_mm_azp": cutlass_scaled_mm_azp,
}
