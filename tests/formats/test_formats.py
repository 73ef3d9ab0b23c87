# SPDX-License-Identifier: Apache-2.0
"""What each format reads out of every checkpoint, against the maker's own library."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.checkpoints import (
    assert_matches_reference,
    checkpoint_reference,
    checkpoint_tensors,
    checkpoints,
    is_ours,
)
from tests.support.described import Described
from tests.support.messages import saying
from tests.support.shards import in_file_order, kind_of, linears, load, read_config, source_of
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parameter import collect_shards, create_parameters
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard
from vllm.compressed_linear.formats.resolution import Delegated, Unquantized
from vllm.compressed_linear.spec.scheme import CheckpointScheme

CONTEXT = LayerContext("bfloat16", "bfloat16")


def standard(shard: LoadedShard) -> torch.Tensor:
    """fp32 [N, K] from what a backend gets."""
    (part,) = refine([shard], CONTEXT)
    return in_file_order(part)


@pytest.mark.parametrize("name", checkpoints(is_ours))
def test_weights_equal_the_makers(name: str) -> None:
    config = read_config(name)
    tensors = dict(config.format.restated(checkpoint_tensors(name).items()))
    reference = checkpoint_reference(name)
    ours = 0
    for linear in linears(name):
        scheme = config.resolve(linear, kind_of(linear))
        n, k = len(reference[f"{linear}.rowsum"]), len(reference[f"{linear}.colsum"])
        assert not isinstance(scheme, Delegated)
        if isinstance(scheme, Unquantized):
            assert_matches_reference(tensors[f"{linear}.weight"].float(), reference, linear)
            continue
        ours += 1
        shard = load(source_of(linear, scheme, n, k), tensors)
        weight = shard.dequantize(0, n)
        assert_matches_reference(weight, reference, linear)
        again = standard(shard)
        # A zero point that is stored multiplied by its scale is divided once more on this way.
        exact = scheme.weight.zero is None or scheme.weight.zero.kind != "minimum"
        allowed = 0.0 if exact else 2.0**-20 * float(weight.abs().max())
        torch.testing.assert_close(again, weight, rtol=0, atol=allowed)
        if ".1." not in linear:
            for axis in ("n", "k"):
                halves = in_two(linear, scheme, n, k, axis, tensors)
                torch.testing.assert_close(halves, weight, rtol=0, atol=0)
    assert ours >= 5


def in_two(
    linear: str,
    scheme: CheckpointScheme,
    n: int,
    k: int,
    axis: str,
    tensors: dict[str, torch.Tensor],
) -> torch.Tensor:
    """fp32 [N, K] from the shards of two ranks, which divide the output or the input channels."""
    length = n if axis == "n" else k
    parts = []
    for start, stop in ((0, length // 2), (length // 2, length)):
        part = {f"{axis}_start": start, axis: stop - start}
        shard = load(source_of(linear, scheme, n, k, part), tensors)
        parts.append(shard.dequantize(0, shard.source.n))
        standard(shard)  # refines without complaint
    return torch.cat(parts, 0 if axis == "n" else 1)


def quantized(
    bits: int, n: int, k: int, groups: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes uint8 [n, k], scales fp16 [n, groups], zero points uint8 [n, groups]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(n, groups, generator=generator) + 0.1).to(torch.float16)
    zero = torch.randint(1 << bits, (n, groups), generator=generator, dtype=torch.uint8)
    return codes, scale, zero


@pytest.mark.needs_vllm
@pytest.mark.parametrize(("method", "names"), [("gptq", "Bs"), ("awq", ("qweight", "scales"))])
@pytest.mark.parametrize("group_size", [128, -1])
def test_marlin_files_are_read_as_vllms_packer_writes_them(
    method: str, names: tuple[str, str], group_size: int
) -> None:
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import (
        get_weight_perm,
        marlin_weights,
    )

    n, k = 256, 384
    codes, scale, _ = quantized(4, n, k, 1 if group_size == -1 else k // group_size)
    packed = marlin_weights(codes.t().to(torch.int32), k, n, 4, get_weight_perm(4))
    permuted = marlin_permute_scales(scale.t().contiguous(), k, n, group_size)
    config: dict[str, Any] = {"bits": 4, "group_size": group_size, "quant_method": method}
    config |= {"is_marlin_format": True} if method == "gptq" else {"version": "marlin"}
    config |= {"zero_point": False}
    scheme = Described.of(config).resolve("a.q_proj")
    assert isinstance(scheme, CheckpointScheme)
    tensors = {f"a.q_proj.{names[0]}": packed, f"a.q_proj.{names[1]}": permuted}
    weight = (codes.float() - 8) * scale.float().repeat_interleave(k // scale.shape[1], 1)

    shard = load(source_of("a.q_proj", scheme, n, k), tensors)
    torch.testing.assert_close(shard.dequantize(0, n), weight, rtol=0, atol=0)
    torch.testing.assert_close(shard.dequantize(37, 201), weight[37:201], rtol=0, atol=0)
    torch.testing.assert_close(standard(shard), weight, rtol=0, atol=0)
    for axis in ("n", "k"):
        halves = in_two("a.q_proj", scheme, n, k, axis, tensors)
        torch.testing.assert_close(halves, weight, rtol=0, atol=0)


@pytest.mark.needs_vllm
def test_marlin_tiles_may_hold_a_part_of_a_fused_weight() -> None:
    """q|k|v in one tensor on disk, each of them no whole number of tiles; two ranks."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import (
        get_weight_perm,
        marlin_weights,
    )

    widths, k = (160, 48, 48), 256
    codes, scale, _ = quantized(4, sum(widths), k, 2)
    packed = marlin_weights(codes.t().to(torch.int32), k, sum(widths), 4, get_weight_perm(4))
    permuted = marlin_permute_scales(scale.t().contiguous(), k, sum(widths), 128)
    weight = (codes.float() - 8) * scale.float().repeat_interleave(128, 1)
    config = {"quant_method": "marlin", "bits": 4, "group_size": 128}
    scheme = Described.of(config).resolve("a.qkv_proj")
    assert isinstance(scheme, CheckpointScheme)
    for rank in (0, 1):
        sources = [
            source_of("a.qkv_proj", scheme, n, k, {"n_start": rank * n // 2, "n": n // 2})
            for n in widths
        ]
        parameters = create_parameters(sources, "a.qkv_proj")
        for name, tensor in (("B", packed), ("s", permuted)):
            parameters[name].weight_loader(parameters[name], tensor)
        expected = [part.chunk(2)[rank] for part in weight.split(widths)]
        for shard, part in zip(collect_shards(parameters, sources), expected, strict=True):
            torch.testing.assert_close(shard.dequantize(0, len(part)), part, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("n", "k", "complaint"),
    [(200, 384, ("N", 64, "N", 200)), (256, 380, ("K", 16))],
)
def test_marlin_needs_whole_tiles(n: int, k: int, complaint: tuple[object, ...]) -> None:
    config = {"bits": 4, "group_size": -1, "quant_method": "marlin"}
    scheme = Described.of(config).resolve("a.q_proj")
    assert isinstance(scheme, CheckpointScheme)
    with pytest.raises(CheckpointError, match=saying("a.q_proj.B", *complaint)):
        create_parameters([source_of("a.q_proj", scheme, n, k)], "a.qkv_proj")


def test_gemv_fast_of_early_autoawq_calls_its_zeros_otherwise(tmp_path: Path) -> None:
    name = "autoawq-awq-gemvfast-g128-asym"
    tensors = {
        key.replace(".qzeros", ".scaled_zeros"): value
        for key, value in checkpoint_tensors(name).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = read_config(name).with_file(tmp_path)
    linear = "model.layers.0.mlp.down_proj"
    scheme = config.resolve(linear)
    assert isinstance(scheme, CheckpointScheme)
    weight = load(source_of(linear, scheme, 256, 512), tensors).dequantize(0, 256)
    assert_matches_reference(weight, checkpoint_reference(name), linear)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_quantized_as_the_installed_library_writes_it(bits: int, symmetric: bool) -> None:
    """Releases before 0.18 pack 3, 5, 6 and 7 bits without straddling words, others densely; the
    width tells, whatever the configuration's version says."""
    scheme, tensors, expected = compressed(bits, symmetric)
    n, k = expected.shape
    config = Described.of(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "version": "0.19.0",
            "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        }
    )
    ours = config.resolve("a.q_proj")
    assert isinstance(ours, CheckpointScheme)
    shard = load(source_of("a.q_proj", ours, n, k), tensors)
    # The library multiplies in the scale's dtype; here that is fp32, so the values are exact.
    torch.testing.assert_close(shard.dequantize(0, n), expected, rtol=0, atol=0)
    torch.testing.assert_close(standard(shard), expected, rtol=0, atol=0)
    for axis in ("n", "k"):
        halves = in_two("a.q_proj", ours, n, k, axis, tensors)
        torch.testing.assert_close(halves, expected, rtol=0, atol=0)


def test_pack_quantized_with_a_group_index() -> None:
    scheme, tensors, expected = compressed(4, True, actorder=True)
    n, k = expected.shape
    config = Described.of(
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        }
    )
    ours = config.resolve("a.q_proj")
    assert isinstance(ours, CheckpointScheme)
    shard = load(source_of("a.q_proj", ours, n, k), tensors)
    torch.testing.assert_close(shard.dequantize(0, n), expected, rtol=0, atol=0)
    torch.testing.assert_close(standard(shard), expected, rtol=0, atol=0)


def compressed(
    bits: int, symmetric: bool, *, actorder: bool = False
) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A weight as the installed compressed-tensors packs it, and as it unpacks it again."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    n, k, group = 72, 256, 64
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": group}
    weights |= {"actorder": "group"} if actorder else {}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    codes, scale, zero = quantized(bits, n, k, k // group, seed=bits)
    scale = scale.to(torch.float32)
    shift = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(1)
    index = torch.arange(k) // group
    if actorder:
        index = index[torch.randperm(k, generator=generator)]
    signed_zero = torch.zeros_like(zero) if symmetric else zero.to(torch.int16) - shift
    values = codes.to(torch.float32) - shift - signed_zero[:, index].to(torch.float32)
    state = {
        "weight": values * scale[:, index],
        "weight_scale": scale,
        "weight_zero_point": signed_zero.to(torch.int8),
    }
    state |= {"weight_g_idx": index.to(torch.int32)} if actorder else {}
    packed = PackedQuantizationCompressor.compress(state, scheme)
    expected = PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
    assert torch.equal(expected, state["weight"])
    if bits in (3, 5, 6, 7):
        assert packed["weight_packed"].shape[1] == -(-k // (32 // bits)), "packs densely by now"
    return scheme, {f"a.q_proj.{key}": value for key, value in packed.items()}, expected


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_gemv_files_of_every_group_size(version: str, group: int) -> None:
    """A packer written number by number from the description of the two layouts."""
    n, k = 8, 384
    size = k if group == -1 else group
    codes, scale, zero = quantized(4, n, k, k // size, seed=group)
    words = -(-(k // size) // 8)
    words += -words % {64: 2, 32: 4}.get(group, 1)
    qweight = torch.zeros((n, k // 8) if version == "gemv" else (n // 4, k), dtype=torch.int64)
    for row, channel in itertools.product(range(n), range(k)):
        code = int(codes[row, channel])
        if version == "gemv":
            qweight[row, channel // 8] |= code << (channel % 8 * 4)
            continue
        # Of 32 channels a·8 + b·2 + c goes to b·8 + c·4 + a; then four rows of 64 in a line.
        a, b, c = channel % 32 // 8, channel % 8 // 2, channel % 2
        place = channel // 32 * 32 + b * 8 + c * 4 + a
        nibble = row % 4 * 64 + place % 64
        qweight[row // 4, place // 64 * 64 + nibble // 4] |= code << (nibble % 4 * 4)
    scales = torch.zeros(n, words * 8, dtype=torch.float16)
    scales[:, : k // size] = scale
    tensors = {"a.q_proj.qweight": qweight.to(torch.int32)}
    if version == "gemv":
        qzeros = torch.zeros(n, words, dtype=torch.int64)
        for row, index in itertools.product(range(n), range(k // size)):
            qzeros[row, index // 8] |= int(zero[row, index]) << (index % 8 * 4)
        tensors |= {"a.q_proj.qzeros": qzeros.to(torch.int32), "a.q_proj.scales": scales}
        expected = (
            codes.float() - zero.repeat_interleave(size, 1)
        ) * scale.float().repeat_interleave(size, 1)
    else:
        tensors["a.q_proj.qweight"] = qweight.to(torch.int16)
        addend = torch.zeros_like(scales)
        addend[:, : k // size] = -(scale.float() * zero).to(torch.float16)
        tensors |= {"a.q_proj.qzeros": addend.t(), "a.q_proj.scales": scales.t()}
        wide = scale.float().repeat_interleave(size, 1)
        expected = codes.float() * wide + addend[:, : k // size].float().repeat_interleave(size, 1)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version}
    scheme = Described.of(config).resolve("a.q_proj")
    assert isinstance(scheme, CheckpointScheme)
    for axis in ("n", "k"):
        halves = in_two("a.q_proj", scheme, n, k, axis, tensors)
        torch.testing.assert_close(halves, expected, rtol=0, atol=0)
