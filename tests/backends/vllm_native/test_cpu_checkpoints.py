# SPDX-License-Identifier: Apache-2.0
"""Real checkpoints on vLLM's own kernel class for CPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.checkpoints import (
    assert_matches_reference,
    checkpoint_reference,
    checkpoint_tensors,
)
from tests.support.cpu_wna16 import (
    Values,
    assert_within_contract,
    needs_kernel,
    prepared,
    reasons,
    stored,
)
from tests.support.messages import says
from vllm.compressed_linear.backends.vllm_native import VllmNativeBackend
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import Part, refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.spec.descriptor import ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.spec.elements import torch_dtype, uint
from vllm.compressed_linear.spec.packing import Packing, ZeroBump
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role

pytestmark = pytest.mark.usefixtures("fresh_answers")


_GPTQ_ZERO = Packing(4, "N", zero_bump=ZeroBump.WORD)
_CHECKPOINTS = {
    "gptqmodel-gptq-w4-g128-sym": ("gptq", 128, _GPTQ_ZERO),
    "gptqmodel-gptq-w4-g32-asym-descact": ("gptq", 32, _GPTQ_ZERO),
    "gptqmodel-gptqv2-w4-g64-asym": ("gptq", 64, Packing(4, "N")),
    "autoawq-awq-gemm-g128-asym": ("awq", 128, None),
    "llmcompressor-w4a16-asym-g32": ("compressed-tensors", 32, None),
    "llmcompressor-w4a16-sym-channel": ("compressed-tensors", -1, None),
}
_LINEARS = ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


@needs_kernel
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", _CHECKPOINTS)
def test_real_checkpoints(name: str, dtype: str) -> None:
    fmt, group, zero_packing = _CHECKPOINTS[name]
    tensors, reference = checkpoint_tensors(name), checkpoint_reference(name)
    for layer in (f"model.layers.1.{linear}" for linear in _LINEARS):
        own = {
            key.removeprefix(layer + "."): tensor
            for key, tensor in tensors.items()
            if key.startswith(layer + ".")
        }
        own.pop("weight_shape", None)
        part = _checkpoint_part(fmt, group, zero_packing, own, dtype)
        plain = part.weights.dequantize(0, part.weights.n)
        assert_matches_reference(plain, reference, layer)
        if dtype == "float16" and part.descriptor.weight.scale.dtype != "float16":  # type: ignore[union-attr]
            assert says(reasons(part.descriptor), "float16", "activations")
            continue
        backend, ready = prepared(part)
        # Through the identity the kernel shows each weight as it multiplies it.
        seen = backend.apply(ready, torch.eye(plain.shape[1]).to(torch_dtype(dtype))).t()
        rounding = VllmNativeBackend.contract(part.descriptor).weight_rounding
        assert bool(
            ((seen.double() - plain.double()).abs() <= rounding * plain.abs() + 2.0**-25).all()
        )
        x = torch.randn(7, plain.shape[1]).to(torch_dtype(dtype))
        assert_within_contract(part, backend.apply(ready, x), x)


def _checkpoint_part(
    fmt: str,
    group: int,
    zero_packing: Packing | None,
    own: dict[str, torch.Tensor],
    dtype: str,
) -> Part:
    """The layer as its tool stored it, described as ``stored`` describes synthetic ones."""
    codes = own["weight_packed" if fmt == "compressed-tensors" else "qweight"]
    n, k = {
        "gptq": (codes.shape[1], codes.shape[0] * 8),
        "awq": (codes.shape[1] * 8, codes.shape[0]),
        "compressed-tensors": (codes.shape[0], codes.shape[1] * 8),
    }[fmt]
    asymmetric = "qzeros" in own or "weight_zero_point" in own
    nothing = torch.zeros(8, 8, dtype=torch.uint8)
    sample = Values(
        nothing,
        nothing if asymmetric else None,
        nothing.float(),
        8,
        own.get("g_idx"),
    )
    described = tuple(
        replace(tensor, packing=zero_packing)
        if tensor.role is Role.ZERO and zero_packing is not None
        else tensor
        for tensor in stored(fmt, sample)[0]
    )
    weight = WeightSpec(
        uint(4) if asymmetric else uint(4, 8),
        ScaleSpec("float32", "group", group),
        ZeroSpec("integer", "uint8") if asymmetric else None,
    )
    source = ShardSource("layer", CheckpointScheme(weight, described), n, k, 0, n, 0, k)
    (part,) = refine([LoadedShard(source, own)], LayerContext(dtype, dtype))
    return part
