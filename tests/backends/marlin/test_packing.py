# SPDX-License-Identifier: Apache-2.0
"""Marlin's layout of checkpoints, bit for bit what vLLM's own Python packers write."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.layers.quantization.utils import marlin_utils, quant_utils

from tests.support.checkpoints import Entry, checkpoint_tensors, checkpoints, is_weight_only
from tests.support.marlin_weights import (
    INTEGERS,
    SCHEMES,
    generator,
    random_weight,
    refined,
    vllm_weight,
)
from tests.support.shards import kind_of, linears, load, read_config, source_of
from vllm.compressed_linear.backends.marlin import packing as marlin_preparation
from vllm.compressed_linear.backends.marlin.packing import prepare
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import ElementType, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


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


def marlin_holds(entry: Entry) -> bool:
    """Whether all of it has a layout of 4 or 8 bits that vLLM unpacks."""
    methods = (("gptq", None), ("awq", "gemm"), ("compressed-tensors", None))
    return (
        is_weight_only(entry)
        and entry.bits in (4, 8)
        and entry.weight_types == {"int"}
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
    config = read_config(name)
    tensors = dict(config.format.restated(checkpoint_tensors(name).items()))
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


def test_the_shape_of_the_weight() -> None:
    _, d = refined(random_weight(SCHEMES["gptq-8-g128"], 64, 128))
    assert marlin_preparation.weight_words(d) == (8, 256)
    assert d.weight.element in (uint(8), uint(8, 128))
