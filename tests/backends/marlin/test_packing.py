# SPDX-License-Identifier: Apache-2.0
"""Marlin's layout, bit for bit what vLLM's own Python packers write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.model_executor.layers.quantization.utils import (
    marlin_utils,
    marlin_utils_fp4,
    marlin_utils_fp8,
    marlin_utils_test,
    quant_utils,
)

from tests.support.checkpoints import Entry, checkpoint_tensors, checkpoints, is_weight_only
from tests.support.messages import saying
from tests.support.shards import kind_of, linears, load, read_config, source_of
from vllm import _custom_ops
from vllm.compressed_linear.backends.marlin import packing as marlin_preparation
from vllm.compressed_linear.backends.marlin.packing import prepare
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.formats.awq import awq_gemm_scheme, awq_gemv_scheme
from vllm.compressed_linear.formats.compressed_tensors import pack_quantized_scheme
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import E2M1, E4M3, ElementType, torch_dtype, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights, StoredTensor
from vllm.compressed_linear.testing.data import load_shard

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))

SHAPES = [(64, 16), (64, 128), (128, 64), (192, 208), (320, 272), (256, 1040)]
"""N and K, whose pieces of 128 channels and of 64 are not all whole."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vllm_weight(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """vLLM's packing of codes [N, K]."""
    n, k = codes.shape
    perm = marlin_utils_test.get_weight_perm(bits)
    return marlin_utils_test.marlin_weights(codes.t().to(torch.int32), k, n, bits, perm)


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


def finite(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 codes without NaN."""
    return torch.where(codes & 0x7F == 0x7F, 0, codes)


@pytest.mark.parametrize("element", ["uint4", "uint8", "e4m3"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_of_the_standard_layout(isa: str, shape: tuple[int, int], element: str) -> None:
    n, k = shape
    bits = 4 if element == "uint4" else 8
    codes = torch.randint(1 << bits, shape, generator=generator(n), dtype=torch.uint8)
    codes = finite(codes) if element == "e4m3" else codes
    packed = torch.full((k // 16, n * bits // 2), -1, dtype=torch.int32)
    torch.ops.compressed_linear.pack_rows("marlin", packed, codes, 0, n, k, element)
    assert torch.equal(packed, vllm_weight(codes, bits))
    unpacked = torch.ops.compressed_linear.unpack_rows("marlin", packed, n, k, k, element)
    assert torch.equal(unpacked, codes)


@given(
    tiles=st.integers(1, 5),
    strips=st.integers(1, 20),
    bits=st.sampled_from([4, 8]),
    cut=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_repack_then_unpack_is_the_identity(
    tiles: int, strips: int, bits: int, cut: int, seed: int
) -> None:
    """Whatever the shape, and also when the rows come in two pieces."""
    n, k, element = 64 * tiles, 16 * strips, f"uint{bits}"
    codes = torch.randint(1 << bits, (n, k), generator=generator(seed), dtype=torch.uint8)
    packed = torch.full((k // 16, n * bits // 2), -1, dtype=torch.int32)
    cut = min(16 * cut, n)
    for start, stop in ((0, cut), (cut, n)):
        rows = codes[start:stop]
        torch.ops.compressed_linear.pack_rows("marlin", packed, rows, start, n, k, element)
    unpacked = torch.ops.compressed_linear.unpack_rows("marlin", packed, n, k, k, element)
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("group", [-1, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_scales(group: int, dtype: torch.dtype, transposed: bool) -> None:
    n, k = 192, 384
    groups = 1 if group == -1 else k // group
    scale = torch.randn(n, groups, generator=generator(group)).to(dtype)
    expected = marlin_utils.marlin_permute_scales(scale.t().contiguous(), k, n, group)
    stored = scale.t().contiguous().t() if transposed else scale
    columns = "channel" if group == -1 else "grouped"
    got = torch.ops.compressed_linear.marlin_scales(stored, columns)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


def test_bias() -> None:
    bias = torch.randn(192, generator=generator(1)).half()
    got = torch.ops.compressed_linear.marlin_scales(bias.unsqueeze(1), "channel")
    assert torch.equal(got[0], marlin_utils.marlin_permute_bias(bias))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_zero_points(bits: int, groups: int) -> None:
    zero = torch.randint(1 << bits, (320, groups), generator=generator(bits), dtype=torch.uint8)
    got = torch.ops.compressed_linear.marlin_zeros(zero, bits)
    expected = marlin_utils.marlin_zero_points(
        zero.t().contiguous().to(torch.int32), groups, 320, bits
    )
    assert torch.equal(got, expected)


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
    "awq": awq_gemm_scheme(64, zero_point=True),
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


def check_integers(weights: CompressedWeights, d: CompressedLinearDescriptor) -> None:
    """Every tensor of ``prepare`` against vLLM's packing of the standard layout."""
    tensors = prepare(weights, d)
    bits = d.weight.element.bits
    whole = weights.rows(0, d.n)
    expected = {"weight": vllm_weight(whole.codes, bits)}
    assert whole.scale is not None
    scale = whole.scale.t().contiguous()
    expected["scale"] = marlin_utils.marlin_permute_scales(scale, d.k, d.n, d.group_size)
    if whole.zero is not None:
        zero = whole.zero.t().contiguous().to(torch.int32)
        expected["zero"] = marlin_utils.marlin_zero_points(zero, d.groups, d.n, bits)
    if weights.permutation is not None:
        expected["order"] = weights.permutation
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(tensors[name], values), name


INTEGERS = [name for name, scheme in SCHEMES.items() if scheme.weight.element.kind == "integer"]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("shape", [(64, 128), (320, 384)], ids=str)
def test_every_layout(isa: str, name: str, shape: tuple[int, int]) -> None:
    native.reset_call_counts()
    check_integers(*refined(random_weight(SCHEMES[name], *shape)))
    [call] = native.call_counts()
    assert call.startswith(f"repack_codes/marlin/{isa}/"), "took a detour"


@pytest.mark.parametrize("name", ["gptq-4-g32", "ct-4-asym", "awq", "gptq-8-g128"])
def test_the_shards_of_a_rank(name: str) -> None:
    """Parts that begin within a word, joined along N to a multiple of 64."""
    parts = [
        {"n_start": 16, "n": 48, "k_start": 128, "k": 256},
        {"n_start": 8, "n": 64, "k_start": 128, "k": 256},
        {"n_start": 4, "n": 16, "k_start": 128, "k": 256},
    ]
    check_integers(
        *refined(*(random_weight(SCHEMES[name], 96, 512, part, i) for i, part in enumerate(parts)))
    )


def test_layouts_that_cannot_be_read_in_place_take_the_standard_layout() -> None:
    native.reset_call_counts()
    shards = [random_weight(SCHEMES["gptq-4-g32"], 64, 64, {"n": n}, n) for n in (24, 40)]
    check_integers(*refined(*shards))
    [call] = native.call_counts()
    assert call.startswith("pack_rows/marlin/")


@pytest.mark.parametrize("bits", [4, 8])
def test_activation_order(isa: str, bits: int) -> None:
    """The order is vLLM's own, and codes are gathered by it."""
    n, k, group = 128, 512, 32
    index = torch.randperm(k, generator=generator(bits)).to(torch.int32) // group
    shard = random_weight(gptq_scheme(bits, group, version="gptq_v2"), n, k, group_index=index)
    tensors = prepare(*refined(shard))
    by_group = torch.argsort(index, stable=True).to(torch.int32)
    assert torch.equal(tensors["order"], by_group)
    assert torch.equal(tensors["weight"], vllm_weight(shard.codes(0, n)[:, by_group], bits))


def test_channels_of_zeros() -> None:
    """Groups of unlike sizes are filled up with channels that no channel of x has."""
    n, k = 64, 256
    index = torch.arange(k, dtype=torch.int32) // 32
    index[32:81] = 0  # 81 channels, and 15 of the third group
    index = index[torch.randperm(k, generator=generator(1))]
    shard = random_weight(gptq_scheme(4, 32, version="gptq_v2"), n, k, group_index=index)
    weights, d = refined(shard)
    assert d.channel_order is not None
    assert d.channel_order.padded
    assert d.k % 16 == 0
    check_integers(weights, d)


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
    # vLLM swaps the middle two of each four beside.
    expected, factor = marlin_utils_fp4.nvfp4_marlin_process_scales(
        scale.view(torch.float8_e4m3fn).half().reshape(1, -1), 2.0**lift
    )
    assert factor == 2.0**lift
    got = vllm_nvfp4_scales(scale.reshape(1, -1).view(torch.float8_e4m3fn), lift)
    swapped = got.view(torch.uint8).reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(1, -1)
    assert torch.equal(swapped, expected.view(torch.uint8))


def marlin_holds(entry: Entry) -> bool:
    """Whether all of it has a layout of 4 or 8 bits that vLLM unpacks."""
    methods = (("gptq", None), ("awq", "gemm"), ("compressed-tensors", None))
    return (
        is_weight_only(entry)
        and entry.bits in (4, 8)
        and (entry.quant_method, entry.version_field) in methods
    )


def vllm_codes(linear: str, tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Codes [N, K] of a layer of a real checkpoint, unpacked by vLLM's own functions."""
    if f"{linear}.weight_packed" in tensors:
        packed = tensors[f"{linear}.weight_packed"]
        return quant_utils.unpack_cols(packed, bits, len(packed), packed.shape[1] * 32 // bits)
    packed = tensors[f"{linear}.qweight"]
    if f"{linear}.g_idx" in tensors:
        columns = packed.t().contiguous()
        return quant_utils.unpack_cols(columns, bits, len(columns), columns.shape[1] * 32 // bits)
    codes = quant_utils.unpack_cols(packed, bits, len(packed), packed.shape[1] * 32 // bits)
    undo = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    return codes.unflatten(1, (-1, 8))[:, :, undo].flatten(1).t()


@pytest.mark.parametrize("name", checkpoints(marlin_holds))
def test_real_checkpoints(name: str) -> None:
    config, tensors = read_config(name), checkpoint_tensors(name)
    seen = 0
    for linear in linears(name):
        scheme = config.resolve(linear, kind_of(linear))
        if not isinstance(scheme, CheckpointScheme) or scheme.weight.element.bits not in (4, 8):
            continue
        bits = scheme.weight.element.bits
        codes = vllm_codes(linear, tensors, bits)
        n, k = codes.shape
        weights, d = refined(load(source_of(linear, scheme, n, k), tensors))
        prepared = prepare(weights, d)
        order = prepared.get("order")
        expected = vllm_weight(codes if order is None else codes[:, order], bits)
        assert torch.equal(prepared["weight"], expected), linear
        check_integers(weights, d)
        if f"{linear}.qzeros" in tensors and f"{linear}.g_idx" not in tensors:
            zeros = marlin_utils.awq_to_marlin_zero_points(
                tensors[f"{linear}.qzeros"], d.groups, n, bits
            )
            assert torch.equal(prepared["zero"], zeros), linear
        seen += 1
    assert seen >= 5


def test_a_codebook_and_float_zero_points() -> None:
    """Codes are indices there, and zero points lie as scales do."""
    book = ElementType("nf4", 4, codebook=tuple(float(i) for i in range(16)))
    scheme = CheckpointScheme(
        WeightSpec(book, ScaleSpec("float16", "group", 64)),
        (
            StoredTensor("codes", Role.CODES, "uint8", ("N", "K"), Packing(4, "K", "uint8")),
            StoredTensor("scale", Role.SCALE, "float16", ("N", "G")),
        ),
    )
    weights, d = refined(random_weight(scheme, 64, 128))
    assert torch.equal(prepare(weights, d)["weight"], vllm_weight(weights.rows(0, 64).codes, 4))


def arguments(**changes: Any) -> dict[str, Any]:
    """Of a call that repacks [64, 32] 4-bit codes from int32 [64, 4]."""
    return {
        "layout": "marlin",
        "packed": torch.zeros(2, 128, dtype=torch.int32),
        "stored": torch.zeros(64, 4, dtype=torch.int32),
        "order": "n_major",
        "k_at": (torch.arange(32, dtype=torch.int32) * 4).reshape(1, 32),
        "n_at": None,
        "widths": [4],
        "flip": 0,
        "n_first": 0,
        "rows": 64,
        "blank": 0,
        "blank_code": 0,
        "row_start": 0,
        "n": 64,
        "group_size": 32,
        "element": "uint4",
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": torch.zeros(2, 64, dtype=torch.int32)}, ("packed", [2, 64])),
        ({"packed": torch.zeros(2, 128, dtype=torch.uint8)}, ("packed", "uint8", "int32")),
        ({"n": 80}, ("n", 80, "multiple", 64)),
        ({"k_at": torch.zeros(1, 24, dtype=torch.int32)}, ("k", 24, "multiple", 16)),
        ({"k_at": torch.zeros((), dtype=torch.int32)}, ("k_at", "[]")),
        ({"k_at": torch.full((1, 32), 128, dtype=torch.int32)}, ("k_at", 128)),
        ({"widths": [3]}, ("widths", 3)),
        ({"element": "uint3"}, ("element", "'uint3'", "uint4", "uint8", "e4m3", "e5m2")),
        ({"element": "bf16"}, ("element", "'bf16'")),
        ({"rows": 65}, (65,)),
        ({"row_start": 8, "rows": 56}, ("row_start", 8)),
    ],
)
def test_what_the_repack_refuses(changes: dict[str, Any], message: tuple[object, ...]) -> None:
    torch.ops.compressed_linear.repack_codes(**arguments())
    with pytest.raises(ValueError, match=saying("compressed_linear::repack_codes", *message)):
        torch.ops.compressed_linear.repack_codes(**arguments(**changes))


@pytest.mark.parametrize(
    ("op", "given", "message"),
    [
        ("marlin_scales", (torch.zeros(60, 2), "grouped"), ("n", 60)),
        ("marlin_scales", (torch.zeros(64), "grouped"), ("scale", [64])),
        ("marlin_scales", (torch.zeros(64, 2), "rows"), ("columns", "'rows'")),
        ("marlin_scales", (torch.zeros(64, 2), "byte"), ("scale", "float32", "byte")),
        ("marlin_scales", (torch.zeros(64, 2).double(), "grouped"), ("scale", "float64")),
        ("marlin_zeros", (torch.zeros(64, 2, dtype=torch.uint8), 3), ("bits", 3)),
        ("marlin_zeros", (torch.zeros(64, 2), 4), ("zero", "float32", "uint8")),
        ("marlin_zeros", (torch.full((64, 2), 16, dtype=torch.uint8), 4), (4,)),
        (
            "pack_rows",
            (
                "marlin",
                torch.zeros(1, 128, dtype=torch.int32),
                torch.full((64, 16), 16, dtype=torch.uint8),
                0,
                64,
                16,
                "uint4",
            ),
            ("rows", 4),
        ),
    ],
)
def test_what_the_other_ops_refuse(
    op: str, given: tuple[Any, ...], message: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=saying(f"compressed_linear::{op}", *message)):
        getattr(torch.ops.compressed_linear, op)(*given)


def test_fake_kernels_have_the_shapes_of_the_ops() -> None:
    ops = torch.ops.compressed_linear
    packed = torch.zeros(2, 128, dtype=torch.int32)
    rows = torch.zeros(64, 32, dtype=torch.uint8)
    for op, args in (
        (ops.pack_rows, ("marlin", packed, rows, 0, 64, 32, "uint4")),
        (ops.repack_codes, tuple(arguments().values())),
        (ops.unpack_rows, ("marlin", packed, 64, 32, 32, "uint4")),
        (ops.marlin_scales, (torch.ones(64, 2), "grouped")),
        (ops.marlin_zeros, (torch.zeros(64, 2, dtype=torch.uint8), 4)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


def test_the_shape_of_the_weight() -> None:
    _, d = refined(random_weight(SCHEMES["gptq-8-g128"], 64, 128))
    assert marlin_preparation.weight_words(d) == (8, 256)
    assert d.weight.element in (uint(8), uint(8, 128))


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_cuda_kernels_are_left_out_where_torch_has_no_cuda() -> None:
    assert native.cuda_available() == f"torch {torch.__version__} has no CUDA"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "CUDA kernels not built"), (b"no library", "CUDA kernels cannot be loaded")],
)
def test_why_there_are_no_cuda_kernels(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the other ops depends on them."""
    library = tmp_path / "libcompressed_linear_cuda.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "CUDA_LIBRARY", library)
    found = native._load_cuda()
    assert found is not None
    assert found.startswith(reason)
