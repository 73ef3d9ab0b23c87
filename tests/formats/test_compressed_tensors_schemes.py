# SPDX-License-Identifier: Apache-2.0
"""Weights of compressed-tensors as the installed library writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.described import Described
from tests.support.format_configs import BLOCKS, FLOAT4, FLOAT8, INT4, NVFP4, groups
from tests.support.format_configs import INT8 as CHANNEL8
from tests.support.messages import saying
from tests.support.shards import in_file_order, load, source_of
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.registry import format_of
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    Unquantized,
)
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import INT8
from vllm.compressed_linear.spec.scheme import CheckpointScheme

CONTEXT = LayerContext("float32", "float32")
NAME = "a.q_proj"
N, K = 200, 336  # ragged blocks
MX = {"strategy": "group", "group_size": 16, "scale_dtype": "torch.uint8"}

WEIGHTS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, (1,)),
    ("int-quantized", {"num_bits": 8, "strategy": "channel"}, (N, 1)),
    ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 48}, (N, K // 48)),
    ("int-quantized", {"num_bits": 8, **BLOCKS}, (2, 3)),
    ("int-quantized", {"num_bits": 4, "strategy": "group", "group_size": 48}, (N, K // 48)),
    ("int-quantized", {"num_bits": 3, "strategy": "channel"}, (N, 1)),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}, (1,)),
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, (N, 1)),
    (
        "int-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 48, "symmetric": False},
        (N, K // 48),
    ),
    ("int-quantized", {"num_bits": 8, "symmetric": False, **BLOCKS}, (2, 3)),
    ("naive-quantized", {"num_bits": 8, "strategy": "channel"}, (N, 1)),
    ("naive-quantized", {**FLOAT8, "strategy": "channel"}, (N, 1)),
    ("float-quantized", {**FLOAT8, "strategy": "tensor"}, (1,)),
    ("float-quantized", {**FLOAT8, "strategy": "channel"}, (N, 1)),
    ("float-quantized", {**FLOAT8, "strategy": "group", "group_size": 48}, (N, K // 48)),
    ("float-quantized", {**FLOAT8, **BLOCKS}, (2, 3)),
    ("mxfp8-quantized", {**FLOAT8, **MX}, (N, K // 16)),
    ("mxfp4-pack-quantized", {**FLOAT4, **MX}, (N, K // 16)),
    ("nvfp4-pack-quantized", NVFP4, (N, K // 16)),
]


def written(
    form: str, weights: dict[str, Any], shape: tuple[int, ...]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight as the installed library compresses it; and what it means, fp32 [N, K]."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(form)
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    scale = torch.rand(shape, generator=generator) + 0.5
    if weights.get("scale_dtype") == "torch.uint8":
        scale = 2.0 ** torch.randint(-6, 6, shape, generator=generator)
    outer = None
    if form == "nvfp4-pack-quantized":
        scale, outer = scale.to(torch.float8_e4m3fn).float(), torch.tensor([37.0])
    if weights.get("block_structure") is None and len(shape) == 2:
        wide = scale.repeat_interleave(K // shape[1], 1)
    else:
        wide = torch.ones(N, K)
    largest = {"int": 1 << (weights["num_bits"] - 1), "float": 6 if "fp4" in form else 448}
    amount = largest[weights.get("type", "int")] * 0.8
    state = {
        "weight": (torch.rand(N, K, generator=generator) * 2 - 1) * amount * wide / (outer or 1),
        "weight_scale": scale,
    }
    if outer is not None:
        state["weight_global_scale"] = outer
    if weights.get("symmetric") is False:
        half = 1 << (weights["num_bits"] - 1)
        zero = torch.randint(-half, half, shape, generator=generator)
        state["weight_zero_point"] = zero.to(torch.int8)
    packed = compressor.compress(state, scheme)
    if "block_structure" in weights:
        # The library pads to whole blocks before it divides, and forgets that when it multiplies.
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:N, :K]
        zero = state.get("weight_zero_point", torch.zeros(shape))
        points = zero.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:N, :K]
        return packed, (packed["weight"].float() - points) * wide
    if "fp4" not in form:
        return packed, compressor.decompress(dict(packed), scheme)["weight"].float()
    values = unpack_fp4_from_uint8(packed["weight_packed"], N, K).float()
    return packed, dequantize(values, scale, global_scale=outer, args=scheme.weights).float()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("form", "weights", "shape"), WEIGHTS)
def test_weights_as_the_installed_library_writes_them(
    form: str, weights: dict[str, Any], shape: tuple[int, ...], known: bool, tmp_path: Path
) -> None:
    """Whole, and as ranks have them that divide rows or channels, also inside of a block."""
    stored, expected = written(form, weights, shape)
    tensors = {f"{NAME}.{key}": value.contiguous() for key, value in stored.items()}
    described = Described.of(groups((["Linear"], weights), format=form))
    if known:
        save_file(tensors, tmp_path / "model.safetensors")
        described = described.with_file(tmp_path)
    scheme = described.resolve(NAME)
    assert isinstance(scheme, CheckpointScheme)
    described.file.check_against_file("layer", NAME, scheme)
    parts: list[dict[str, int]] = [{}, {"n_start": 64, "n": 136}, {"n_start": 0, "n": 96}]
    parts += [{"k_start": 96, "k": 240}, {"k_start": 0, "k": 96}]
    for part in parts:
        shard = load(source_of(NAME, scheme, N, K, part), tensors)
        n, k = part.get("n_start", 0), part.get("k_start", 0)
        own = expected[n : n + part.get("n", N), k : k + part.get("k", K)]
        torch.testing.assert_close(shard.dequantize(0, len(own)), own, rtol=3e-7, atol=0)
        (refined,) = refine([shard], CONTEXT)
        torch.testing.assert_close(in_file_order(refined), own, rtol=3e-7, atol=0)


# What the file shows goes before what the configuration says.


@pytest.mark.parametrize("stated", [0, 1, 2, 3])
@pytest.mark.parametrize("stored", [0, 1, 2, 3])
@pytest.mark.parametrize("first", [0, 12])
def test_the_file_tells_shapes_of_scales(
    first: int, stated: int, stored: int, tmp_path: Path
) -> None:
    """Integers, and from the 12th on fp8."""
    form, weights, _ = WEIGHTS[first + stated]
    tensors, expected = written(*WEIGHTS[first + stored])
    named = {f"{NAME}.{key}": value.contiguous() for key, value in tensors.items()}
    save_file(named, tmp_path / "model.safetensors")
    described = Described.of(groups((["Linear"], weights), format=form)).with_file(tmp_path)
    scheme = described.resolve(NAME)
    assert isinstance(scheme, CheckpointScheme)
    shard = load(source_of(NAME, scheme, N, K), named)
    torch.testing.assert_close(shard.dequantize(0, N), expected, rtol=3e-7, atol=0)


def test_packed_words_where_the_configuration_says_int8_and_the_other_way_round(
    tmp_path: Path,
) -> None:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 48}
    for stored, stated in (
        ("int-quantized", "pack-quantized"),
        ("pack-quantized", "int-quantized"),
    ):
        tensors, expected = written(stored, weights, (N, K // 48))
        named = {f"{NAME}.{key}": value.contiguous() for key, value in tensors.items()}
        save_file(named, tmp_path / "model.safetensors")
        config = groups((["Linear"], weights), format=stated)
        scheme = Described.of(config).with_file(tmp_path).resolve(NAME)
        assert isinstance(scheme, CheckpointScheme)
        shard = load(source_of(NAME, scheme, N, K), named)
        torch.testing.assert_close(shard.dequantize(0, N), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_scales_of_channels_with_and_without_a_second_axis(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    tensors, expected = written("float-quantized", {**FLOAT8, "strategy": "channel"}, (N, 1))
    tensors["weight_scale"] = tensors["weight_scale"].reshape(shape)
    named = {f"{NAME}.{key}": value for key, value in tensors.items()}
    save_file(named, tmp_path / "model.safetensors")
    weights = {**FLOAT8, "strategy": "tensor"}
    config = groups((["Linear"], weights), format="float-quantized")
    scheme = Described.of(config).with_file(tmp_path).resolve(NAME)
    assert isinstance(scheme, CheckpointScheme)
    shard = load(source_of(NAME, scheme, N, K), named)
    torch.testing.assert_close(shard.dequantize(0, N), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["int-quantized", "float-quantized", "pack-quantized"])
def test_a_plain_weight_goes_first(form: str, tmp_path: Path) -> None:
    save_file({f"{NAME}.weight": torch.zeros(N, K).bfloat16()}, tmp_path / "model.safetensors")
    kind = "float" if form == "float-quantized" else "int"
    weights = {"num_bits": 8, "strategy": "channel", "type": kind}
    config = groups((["Linear"], weights), format=form)
    found = Described.of(config).with_file(tmp_path).resolve(NAME)
    assert found == Unquantized(f"the checkpoint holds a plain {NAME}.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_of_a_module_that_is_said_to_be_unquantized_are_an_error(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {f"{NAME}.weight": torch.zeros(N, K).to(dtype), f"{NAME}.weight_scale": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = {"num_bits": 8, "strategy": "channel"}
    config = groups((["Linear"], weights), format="int-quantized", ignore=[NAME])
    described = Described.of(config).with_file(tmp_path)
    found = described.resolve(NAME)
    assert isinstance(found, Unquantized)
    with pytest.raises(ConfigError, match=saying(NAME, "unquantized", f"ignore: {NAME}")):
        described.file.check_against_file("layer", NAME, found)


def test_4_bit_codes_in_int8_that_have_more_bits_are_an_error() -> None:
    weights = {"num_bits": 4, "strategy": "channel"}
    scheme = Described.of(groups((["Linear"], weights), format="int-quantized")).resolve(NAME)
    assert isinstance(scheme, CheckpointScheme)
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    codes[3, 5] = 9
    tensors = {f"{NAME}.weight": codes, f"{NAME}.weight_scale": torch.ones(N, 1)}
    shard = load(source_of(NAME, scheme, N, K), tensors)
    with pytest.raises(CheckpointError, match=saying(f"{NAME}.weight", 9, -8, 7)):
        refine([shard], CONTEXT)


@pytest.mark.parametrize("zero", [None, 0, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_zero_point_next_to_a_symmetric_scale_must_be_0(
    symmetric: bool, zero: int | None, tmp_path: Path
) -> None:
    """Early releases wrote one next to each scale."""
    tensors, _ = written("int-quantized", CHANNEL8, (N, 1))
    tensors["input_scale"] = torch.tensor([0.02])
    if zero is not None:
        tensors["input_zero_point"] = torch.tensor([zero], dtype=torch.int8)
    named = {f"{NAME}.{key}": value for key, value in tensors.items()}
    save_file(named, tmp_path / "model.safetensors")
    config = groups((["Linear"], CHANNEL8), format="int-quantized")
    inputs = {"num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": symmetric}
    config["config_groups"]["group_0"]["input_activations"] = inputs
    described = Described.of(config).with_file(tmp_path)
    scheme = described.resolve(NAME)
    assert isinstance(scheme, CheckpointScheme)
    if zero is None and not symmetric:
        with pytest.raises(ConfigError, match=saying(f"{NAME}.input_zero_point")):
            described.file.check_against_file("layer", NAME, scheme)
        return
    shard = load(source_of(NAME, scheme, N, K), named)
    if zero and symmetric:
        with pytest.raises(CheckpointError, match=saying(f"{NAME}.input_zero_point", 7.0)):
            refine([shard], CONTEXT)
        return
    (part,) = refine([shard], CONTEXT)
    assert part.descriptor.activation == ActivationSpec(INT8, False, "tensor", symmetric)


@pytest.mark.parametrize(
    ("weights", "form", "word"),
    [
        ({**FLOAT8, "strategy": "channel", "symmetric": False}, "float-quantized", "asymmetric"),
        ({"num_bits": 6, "type": "float", **MX}, "float-quantized", "6-bit float"),
        ({**FLOAT8, "strategy": "attn_head"}, "float-quantized", "attn_head"),
        (INT4, "marlin-24", "format marlin-24"),
        ({**FLOAT8, "strategy": "channel"}, "int-quantized", "float weights"),
        ({"strategy": "tensor", "num_bits": 4}, "pack-quantized", "strategy tensor"),
    ],
)
def test_other_schemes_are_left_to_vllm(weights: dict[str, Any], form: str, word: str) -> None:
    config = groups((["Linear"], weights), format=form)
    assert format_of(config) is None
    found = Described.of(config).resolve(NAME)
    assert isinstance(found, Delegated)
    assert word in found.reason


@pytest.mark.parametrize("structure", [None, [128], "128", [0, 128], ["a", 128]])
def test_blocks_must_have_two_sizes(structure: Any) -> None:
    weights = {**FLOAT8, "strategy": "block", "block_structure": structure}
    with pytest.raises(ConfigError, match=saying("weights.block_structure", "two positive")):
        Described.of(groups((["Linear"], weights), format="float-quantized"))


def test_blocks_as_a_text_and_fields_that_change_nothing() -> None:
    plain = groups((["Linear"], {**FLOAT8, **BLOCKS}), format="float-quantized")
    other = json.loads(json.dumps(plain))
    more = {
        "block_structure": "128x128",
        "observer": "minmax",
        "observer_kwargs": {"a": 1},
        "scale_dtype": None,
        "zp_dtype": "torch.int8",
        "actorder": None,
        "new": [1],
    }
    other["config_groups"]["group_0"]["weights"] |= more
    assert Described.of(other).resolve(NAME) == Described.of(plain).resolve(NAME)
