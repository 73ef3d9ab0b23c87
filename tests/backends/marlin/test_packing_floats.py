# SPDX-License-Identifier: Apache-2.0
"""Marlin's layout of small floats, bit for bit what vLLM's own preparation of layers makes."""

from __future__ import annotations

import math

import pytest
import torch
from vllm.model_executor.layers.quantization.utils import (
    marlin_utils_fp4,
    marlin_utils_fp8,
    quant_utils,
)

from tests.support.marlin_weights import (
    INTEGERS,
    SCHEMES,
    generator,
    random_weight,
    refined,
    vllm_weight,
)
from vllm import _custom_ops
from vllm.compressed_linear.backends.marlin.packing import prepare
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import E2M1, torch_dtype

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


@pytest.fixture
def vllm_repack(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's repack op, which is for GPUs, replaced by vLLM's Python packer."""

    def gptq_marlin_repack(
        b_q_weight: torch.Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool = False
    ) -> torch.Tensor:
        assert not is_a_8bit
        unpacked = quant_utils.unpack_cols(b_q_weight.t(), num_bits, size_n, size_k)
        return vllm_weight(unpacked, num_bits)

    monkeypatch.setattr(_custom_ops, "gptq_marlin_repack", gptq_marlin_repack)


def layer_of(weights: CompressedWeights, d: CompressedLinearDescriptor) -> torch.nn.Module:
    """What vLLM's preparation of fp8 and fp4 layers works on."""
    layer = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition = d.n, d.k
    layer.orig_dtype = layer.params_dtype = getattr(torch, d.input_dtype)
    layer.logical_widths = [d.n]
    whole = weights.rows(0, d.n)
    codes = whole.codes
    if d.weight.element == E2M1:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    else:
        codes = codes.view(torch.float8_e4m3fn)
    assert whole.scale is not None
    layer.weight = torch.nn.Parameter(codes, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(whole.scale.contiguous(), requires_grad=False)
    if weights.row_scale is not None:
        layer.weight_global_scale = torch.nn.Parameter(weights.row_scale[0], requires_grad=False)
    return layer


NVFP4_EXPONENT = 7
"""What of the bias vLLM's kernels leave to NVFP4's group scales; the row scale has the rest."""


def vllm_scales(
    tensors: dict[str, torch.Tensor], d: CompressedLinearDescriptor
) -> dict[str, torch.Tensor]:
    """``scale`` and, for NVFP4, ``row_scale`` as vLLM's own Marlin kernels want them, which
    otherwise take the ``tensors`` that ``prepare`` makes.

    Of e2m1 and e4m3 weights they leave an exponent bias to the scales.
    """
    element, wide, scale = d.weight.element, torch_dtype(d.input_dtype), tensors["scale"]
    if element.kind != "float" or scale.dtype == torch.uint8:
        return {"scale": scale}
    exponent_bits = 5 if wide == torch.float16 else 8
    missing = (1 << (exponent_bits - 1)) - (1 << (element.exponent - 1))
    if scale.dtype != torch.float8_e4m3fn:
        return {"scale": scale.to(wide) * 2.0**missing}
    lift, largest = 0, float(scale.float().max())
    if wide != torch.float16 and largest > 0:
        lift = math.floor(math.log2(448 / largest))
    row_scale = tensors["row_scale"] if "row_scale" in tensors else torch.ones(d.n)
    return {
        "scale": vllm_nvfp4_scales(scale, lift),
        "row_scale": row_scale * 2.0 ** (missing - NVFP4_EXPONENT - lift),
    }


def vllm_nvfp4_scales(scale: torch.Tensor, lift: int) -> torch.Tensor:
    """float8_e4m3fn scales times 2^(7 + lift), as the upper bytes of float16 numbers without their
    sign: five exponent bits and three of the mantissa. What is below 2 becomes 0."""
    halves = (scale.float() * 2.0 ** (NVFP4_EXPONENT + lift)).half()
    upper = (halves.view(torch.int16) >> 7).to(torch.uint8)
    return torch.where(halves < 2, 0, upper).view(torch.float8_e4m3fn)


@pytest.mark.usefixtures("vllm_repack")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in INTEGERS])
def test_small_floats(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of vLLM's own preparation of a layer, and ours in the form of its kernels."""
    n, k = 320, 384
    weights, d = refined(random_weight(SCHEMES[name], n, k), dtype=dtype)
    tensors = prepare(weights, d)
    ours = tensors | vllm_scales(tensors, d)
    layer = layer_of(weights, d)
    # vLLM takes the dtype of MXFP8's layers from torch.
    monkeypatch.setattr(torch, "get_default_dtype", lambda: getattr(torch, dtype))
    if d.weight.element == E2M1:
        marlin_utils_fp4.prepare_fp4_layer_for_marlin(layer)
    elif name == "mxfp8":
        marlin_utils_fp8.prepare_mxfp8_layer_for_marlin(layer)
    else:
        if name == "fp8-group":
            layer.weight_block_size = [1, 128]
        marlin_utils_fp8.prepare_fp8_layer_for_marlin(layer, size_k_first=False)
    assert torch.equal(ours["weight"], layer.weight)
    assert torch.equal(ours["scale"].view(layer.weight_scale.dtype), layer.weight_scale)
    if name == "nvfp4":
        assert torch.equal(ours["row_scale"], layer.weight_global_scale.expand(n))


@pytest.mark.usefixtures("vllm_repack")
@pytest.mark.parametrize("group", [-1, 128])
def test_vllm_s_own_fp8_weights(group: int) -> None:
    dense = torch.randn(128, 256, generator=generator(group)).half()
    _, weight, scale = marlin_utils_fp8.marlin_quant_fp8_torch(dense, group)
    # The same quantization, from its definition.
    wide = dense.unflatten(1, (-1, 256 if group == -1 else group))
    scales = wide.abs().amax(-1) / 448
    codes = (wide / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    packed = torch.empty_like(weight)
    torch.ops.compressed_linear.pack_rows("marlin", packed, codes, 0, 128, 256, "e4m3")
    assert torch.equal(packed, weight)
    columns = "channel" if group == -1 else "grouped"
    moved = torch.ops.compressed_linear.marlin_scales(scales, columns)
    assert torch.equal(moved * 2.0**8, scale)


@pytest.mark.usefixtures("vllm_repack")
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_vllm_s_own_fp4_weights(name: str, dtype: torch.dtype) -> None:
    """vLLM's random weights, decoded from our reading of what it packed."""
    n, k, group = 64, 256, 16 if name == "nvfp4" else 32
    torch.manual_seed(3)
    dense = torch.randn(n, k, dtype=dtype)
    make = getattr(marlin_utils_fp4, f"rand_marlin_weight_{name}_like")
    expected, weight, scale, *rest = make(dense, group)
    codes = torch.ops.compressed_linear.unpack_rows("marlin", weight, n, k, k, "uint4")
    # [G, N] with a scale for each channel, put back into the order of the channels.
    numbered = torch.arange(n, dtype=torch.uint8).unsqueeze(1)
    order = torch.ops.compressed_linear.marlin_scales(numbered, "byte")[0].long()
    plain = torch.empty_like(scale.view(torch.uint8))
    plain[:, order] = scale.view(torch.uint8)
    if name == "mxfp4":
        values = torch.exp2(plain.double() - 127)
    else:
        exponents, mantissas = (plain >> 3).double(), (plain & 7).double()
        values = torch.where(plain == 0, 0, (1 + mantissas / 8) * torch.exp2(exponents - 15))
        missing = 126 if dtype == torch.bfloat16 else 14
        values = values * rest[0].double() * 2.0**-missing
    decoded = E2M1.decode(codes).double() * values.t().repeat_interleave(group, 1)
    torch.testing.assert_close(
        decoded.t(), expected.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-9
    )


@pytest.mark.parametrize("lift", range(0, 18, 3))
def test_nvfp4_scales_are_vllm_s(lift: int) -> None:
    """Every e4m3 number that the lift leaves in range."""
    scale = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = scale[scale.float() * 2.0**lift <= 448]
    scale = torch.nn.functional.pad(scale.view(torch.uint8), (0, -len(scale) % 4))
    # vLLM swaps the middle two of each four too.
    expected, factor = marlin_utils_fp4.nvfp4_marlin_process_scales(
        scale.view(torch.float8_e4m3fn).half().reshape(1, -1), 2.0**lift
    )
    assert factor == 2.0**lift
    got = vllm_nvfp4_scales(scale.reshape(1, -1).view(torch.float8_e4m3fn), lift)
    swapped = got.view(torch.uint8).reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(1, -1)
    assert torch.equal(swapped, expected.view(torch.uint8))
