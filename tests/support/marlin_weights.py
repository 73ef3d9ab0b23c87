# SPDX-License-Identifier: Apache-2.0
"""Random weights in every layout that Marlin's is written from, and vLLM's packing of codes."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.utils import marlin_utils_test

from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.formats.awq import awq_gemm_scheme, awq_gemv_scheme
from vllm.compressed_linear.formats.compressed_tensors_schemes import pack_quantized_scheme
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import E2M1, E4M3, ElementType
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights, StoredTensor
from vllm.compressed_linear.testing.data import load_shard


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vllm_weight(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """vLLM's packing of codes [N, K]."""
    n, k = codes.shape
    perm = marlin_utils_test.get_weight_perm(bits)
    return marlin_utils_test.marlin_weights(codes.t().to(torch.int32), k, n, bits, perm)


def finite(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 codes without NaN."""
    return torch.where(codes & 0x7F == 0x7F, 0, codes)


def float_scheme(element: ElementType, scale: ScaleSpec, row_scale: bool) -> CheckpointScheme:
    """Small floats as the makers of fp8, NVFP4 and MXFP4 checkpoints lay them out."""
    packing = Packing(4, "K", "uint8") if element.bits == 4 else None
    tensors = [
        StoredTensor(
            "weight", Role.CODES, "uint8" if packing else "float8_e4m3fn", ("N", "K"), packing
        ),
        StoredTensor("scale", Role.SCALE, scale.dtype, ("N", "G")),
    ]
    if row_scale:
        tensors.append(StoredTensor("scale_2", Role.ROW_SCALE, "float32", (1,)))
    spec = WeightSpec(element, scale, row_scale="float32" if row_scale else None)
    return CheckpointScheme(spec, tuple(tensors))


SCHEMES = {
    **{
        f"gptq-{bits}-g{group}": gptq_scheme(bits, group, version="gptq_v2")
        for bits in (4, 8)
        for group in (-1, 32, 128)
    },
    "gptq-v1": gptq_scheme(4, 32, version="gptq"),
    **{
        f"ct-{bits}-{'sym' if symmetric else 'asym'}": pack_quantized_scheme(
            bits, 64, symmetric=symmetric, group_index=False
        )
        for bits in (4, 8)
        for symmetric in (True, False)
    },
    "awq": awq_gemm_scheme(64),
    "awq-gemv": awq_gemv_scheme(64),
    "fp8-channel": float_scheme(E4M3, ScaleSpec("float32", "channel"), False),
    "fp8-group": float_scheme(E4M3, ScaleSpec("bfloat16", "group", 128), False),
    "mxfp8": float_scheme(E4M3, ScaleSpec("e8m0", "group", 32), False),
    "mxfp4": float_scheme(E2M1, ScaleSpec("e8m0", "group", 32), False),
    "nvfp4": float_scheme(E2M1, ScaleSpec("float8_e4m3fn", "group", 16), True),
}


def random_weight(
    scheme: CheckpointScheme,
    n: int,
    k: int,
    part: dict[str, int] | None = None,
    seed: int = 0,
    group_index: torch.Tensor | None = None,
) -> LoadedShard:
    """Of a random weight [n, k] on disk what a rank with ``part`` of a ``ShardSource`` keeps."""
    g, weight = generator(seed), scheme.weight
    groups = weight.groups(k)
    codes = torch.randint(1 << weight.element.bits, (n, k), generator=g, dtype=torch.uint8)
    assert weight.scale is not None
    scale = torch.rand(n, groups, generator=g) + 0.01
    scales = {
        "e8m0": torch.randint(110, 120, (n, groups), generator=g, dtype=torch.uint8),
        "float8_e4m3fn": (scale * 300).to(torch.float8_e4m3fn),
    }
    zero = torch.randint(1 << weight.element.bits, (n, groups), generator=g, dtype=torch.uint8)
    stored = from_standard_layout(
        scheme,
        StandardWeights(
            finite(codes) if weight.element == E4M3 else codes,
            scales.get(weight.scale.dtype, scale.to(elements.torch_dtype(weight.scale.dtype)))
            if weight.scale.dtype in scales
            else scale.to(elements.torch_dtype(weight.scale.dtype)),
            zero if any(t.role is Role.ZERO for t in scheme.tensors) else None,
        ),
        group_index,
        row_scale=torch.full((n,), 0.25) if weight.row_scale else None,
    )
    whole: dict[str, Any] = {"n_start": 0, "n": n, "k_start": 0, "k": k}
    return load_shard(ShardSource("layer", scheme, n, k, **(whole | (part or {}))), stored)


def refined(
    *shards: LoadedShard, dtype: str = "bfloat16"
) -> tuple[CompressedWeights, CompressedLinearDescriptor]:
    [part] = refine(shards, LayerContext(dtype, dtype))
    return part.weights, part.descriptor


INTEGERS = [name for name, scheme in SCHEMES.items() if scheme.weight.element.kind == "integer"]
