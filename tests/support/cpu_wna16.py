# SPDX-License-Identifier: Apache-2.0
"""Weights of every format for vLLM's CPU kernel of 4-bit weights, and the contract of its
output."""

from __future__ import annotations

import platform as host
from dataclasses import dataclass, replace

import pytest
import torch

from vllm.compressed_linear.backends import vllm_native
from vllm.compressed_linear.backends.contract import contract_bound
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.backends.vllm_native import VllmNativeBackend
from vllm.compressed_linear.backends.vllm_native.classes import operators, tables
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import Part, refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.machine.platform import Platform, cpu_features
from vllm.compressed_linear.spec.descriptor import (
    CompressedLinearDescriptor,
    ScaleSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import ElementType, torch_dtype, uint
from vllm.compressed_linear.spec.packing import Packing, ZeroBump, pack
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

HERE = Platform("cpu", host.machine(), cpu_features())
FORMATS = ("gptq", "awq", "compressed-tensors")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
needs_kernel = pytest.mark.skipif(
    tables.unavailable("mixed precision") is not None
    or operators.missing_op(vllm_native.CPU_OP, HERE) is not None,
    reason="vLLM's cpu_gemm_wna16 cannot run here",
)


@dataclass(frozen=True)
class Values:
    """A weight: codes [N, K], zero [N, G] or None, scale [N, G], group index [K] or None."""

    codes: torch.Tensor
    zero: torch.Tensor | None
    scale: torch.Tensor
    group: int
    index: torch.Tensor | None = None
    element: ElementType = uint(4, 8)  # noqa: RUF009  # frozen


def values(
    n: int = 64,
    k: int = 128,
    group: int = 32,
    *,
    zero: bool = False,
    scale_dtype: str = "bfloat16",
    seed: int = 0,
) -> Values:
    random = torch.Generator().manual_seed(seed)
    groups = k // group
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=random)
    points = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=random)
    scale = torch.rand(n, groups, generator=random) * 0.02 + 0.001
    element = uint(4) if zero else uint(4, 8)
    return Values(
        codes,
        points if zero else None,
        scale.to(torch_dtype(scale_dtype)),
        group,
        element=element,
    )


def stored(fmt: str, v: Values) -> tuple[tuple[StoredTensor, ...], dict[str, torch.Tensor]]:
    """The weight as ``fmt`` lays it out on disk: the tensors' descriptions and the tensors."""
    index = StoredTensor("g_idx", Role.GROUP_INDEX, "int32", ("K",))
    if fmt == "gptq":
        # v1 stores each zero point less one.
        along_k, along_n = Packing(4, "K"), Packing(4, "N", zero_bump=ZeroBump.FIELD)
        described = [
            StoredTensor("qweight", Role.CODES, "int32", ("K", "N"), along_k),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N")),
            StoredTensor("qzeros", Role.ZERO, "int32", ("G", "N"), along_n),
        ]
        tensors = {"qweight": pack(v.codes.t(), along_k, 0), "scales": v.scale.t().contiguous()}
        if v.zero is not None:
            tensors["qzeros"] = pack(v.zero.t(), along_n)
    elif fmt == "awq":
        awq = Packing(4, "N", order=AWQ_ORDER)
        described = [
            StoredTensor("qweight", Role.CODES, "int32", ("K", "N"), awq),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N")),
            StoredTensor("qzeros", Role.ZERO, "int32", ("G", "N"), awq),
        ]
        tensors = {"qweight": pack(v.codes.t(), awq), "scales": v.scale.t().contiguous()}
        if v.zero is not None:
            tensors["qzeros"] = pack(v.zero.t(), awq)
    else:
        along_k, along_n = Packing(4, "K"), Packing(4, "N")
        described = [
            StoredTensor("weight_packed", Role.CODES, "int32", ("N", "K"), along_k),
            StoredTensor("weight_scale", Role.SCALE, "float32", ("N", "G")),
            StoredTensor("weight_zero_point", Role.ZERO, "int32", ("N", "G"), along_n),
        ]
        tensors = {"weight_packed": pack(v.codes, along_k), "weight_scale": v.scale.clone()}
        if v.zero is not None:
            tensors["weight_zero_point"] = pack(v.zero, along_n, 0)
    if v.zero is None:
        described = [tensor for tensor in described if tensor.role is not Role.ZERO]
    if v.index is not None:
        described.append(index)
        tensors["g_idx"] = v.index.to(torch.int32)
    return tuple(described), tensors


def part_of(fmt: str, v: Values, dtype: str = "bfloat16") -> Part:
    """Descriptor and weights of the layer, by the same way a checkpoint takes."""
    described, tensors = stored(fmt, v)
    weight = WeightSpec(
        v.element,
        ScaleSpec("float32", "group", v.group),
        None if v.zero is None else ZeroSpec("integer", "uint8"),
    )
    n, k = v.codes.shape
    source = ShardSource("layer", CheckpointScheme(weight, described), n, k, 0, n, 0, k)
    (part,) = refine([LoadedShard(source, tensors)], LayerContext(dtype, dtype))
    return part


def prepared(part: Part) -> tuple[VllmNativeBackend, dict[str, torch.Tensor]]:
    verdict = VllmNativeBackend.can_implement(part.descriptor, HERE)
    assert verdict, str(verdict)
    backend = VllmNativeBackend(part.descriptor)
    return backend, backend.prep_weights_for_execution(part.weights)


def reference_output(part: Part, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``ReferenceBackend`` with fp32 output."""
    wide = ReferenceBackend(replace(part.descriptor, output_dtype="float32"))
    return wide.apply(wide.prep_weights_for_execution(part.weights), x, bias)


def as_multiplied(part: Part) -> torch.Tensor:
    """ŵ [N, K of x] as the contract says the kernel multiplies it: scale cast, product rounded."""
    rows = part.weights.rows(0, part.weights.n)
    assert rows.scale is not None
    dtype = torch_dtype(part.descriptor.input_dtype)
    code = part.descriptor.weight.element.decode(rows.codes)
    if rows.zero is not None:
        code = code - rows.zero.float().repeat_interleave(part.descriptor.group_size, 1)
    scale = rows.scale.to(dtype).float().repeat_interleave(part.descriptor.group_size, 1)
    weight = (code * scale).to(dtype).double()
    if part.weights.permutation is None:
        return weight
    order = part.weights.permutation.long()
    out = torch.zeros(weight.shape[0], part.descriptor.in_features, dtype=torch.float64)
    return out.index_add_(1, order[order >= 0], weight[:, order >= 0])


def assert_within_contract(
    part: Part, got: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """``got`` [M, N] is in the stated contract, and in the standard one for rounded weights."""
    d = part.descriptor
    offset = 0.0 if bias is None else bias.double()
    plain = part.weights.dequantize(0, d.n)
    expected = x.double() @ plain.double().t() + offset
    allowed = contract_bound(
        x,
        plain.abs(),
        expected,
        d.output_dtype,
        VllmNativeBackend.contract(d),
    )
    reference = reference_output(part, x, bias).double()
    slack = contract_bound(x, plain.abs(), expected, "float32", ReferenceBackend.contract(d))
    assert bool(((got.double() - expected).abs() <= allowed).all())
    assert bool(((got.double() - reference).abs() <= allowed + slack).all())

    # This bound is much closer: one code off by one in a row of hundreds breaks it.
    weight = as_multiplied(part)
    rounded = x.double() @ weight.t() + offset
    close = contract_bound(x, weight.abs(), rounded, d.output_dtype)
    worst = float(((got.double() - rounded).abs() / close).max()) if got.numel() else 0.0
    assert worst <= 1, f"{worst:.3g} times the error allowed for weights rounded to {d.input_dtype}"


def reasons(d: CompressedLinearDescriptor, platform: Platform = HERE) -> str:
    verdict = VllmNativeBackend.can_implement(d, platform)
    assert not verdict
    return "\n".join(verdict.reasons)
