# SPDX-License-Identifier: Apache-2.0
"""Zero points as early compressed-tensors wrote them, and those left over in symmetric files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.described import Described
from tests.support.format_configs import INT4, groups
from tests.support.messages import saying
from tests.support.shards import load, source_of
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.spec.packing import Packing, pack
from vllm.compressed_linear.spec.scheme import CheckpointScheme

CONTEXT = LayerContext("bfloat16", "bfloat16")
N, K = 96, 256
NAME = "a.q_proj"

Tensors = dict[str, torch.Tensor]


def file(bits: int, group: int, seed: int = 0) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """Codes and scales as tensors; the signed values [N, K], and the scales [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (N, K), generator=generator)
    scale = torch.rand(N, K // group, generator=generator) + 0.1
    codes = (values + (1 << (bits - 1))).to(torch.uint8)
    tensors = {
        f"{NAME}.weight_packed": pack(codes, Packing(bits, dense=32 % bits == 0), 1),
        f"{NAME}.weight_scale": scale,
        f"{NAME}.weight_shape": torch.tensor([N, K]),
    }
    return tensors, values, scale.repeat_interleave(group, 1)


def config(bits: int, group: int, *, symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group", "group_size": group}
    return groups((["Linear"], weights), version="0.6.0")


def read(
    settings: dict[str, Any], tensors: Tensors, known: Path | None, expected: torch.Tensor
) -> CheckpointScheme:
    """Compare on one rank and on two, with and without the headers of a file."""
    described = Described.of(settings)
    if known is not None:
        save_file(tensors, known / "model.safetensors")
        described = described.with_file(known)
    scheme = described.resolve(NAME)
    assert isinstance(scheme, CheckpointScheme)
    described.file.check_against_file("layer", NAME, scheme)
    for part in ({}, {"n_start": 32, "n": 64}, {"k_start": 128, "k": 128}):
        shard = load(source_of(NAME, scheme, N, K, part), tensors)
        n, k = part.get("n_start", 0), part.get("k_start", 0)
        own = expected[n : n + part.get("n", N), k : k + part.get("k", K)]
        torch.testing.assert_close(shard.dequantize(0, len(own)), own, rtol=0, atol=0)
        (refined,) = refine([shard], CONTEXT)
        got = refined.weights.dequantize(0, len(own))
        torch.testing.assert_close(got, own, rtol=0, atol=0)
        symmetric = scheme.symmetric or scheme.weight.zero is None
        assert (refined.descriptor.weight.zero is None) == bool(symmetric)
    return scheme


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("group", [64, K])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_signed_zero_points_that_are_not_packed(
    bits: int, group: int, dtype: torch.dtype, known: bool, tmp_path: Path
) -> None:
    tensors, values, scale = file(bits, group)
    half = 1 << (bits - 1)
    zero = torch.randint(-half, half, (N, K // group), generator=torch.Generator().manual_seed(1))
    zero[0, 0] = -half
    tensors[f"{NAME}.weight_zero_point"] = zero.to(dtype)
    expected = (values - zero.repeat_interleave(group, 1)).float() * scale
    settings = config(bits, group, symmetric=False)
    read(settings, tensors, tmp_path if known else None, expected)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("left", ["signed", "packed", "zeros", "empty"])
def test_zero_points_left_in_a_symmetric_file(
    left: str, bits: int, known: bool, tmp_path: Path
) -> None:
    tensors, values, scale = file(bits, 64)
    middle = torch.full((N, K // 64), 1 << (bits - 1), dtype=torch.uint8)
    packed = pack(middle, Packing(bits, "N"), 0)
    tensors[f"{NAME}.weight_zero_point"] = {
        "signed": torch.zeros(N, K // 64, dtype=torch.int8),
        "packed": packed,
        "zeros": packed * 0,
        "empty": torch.empty(0, dtype=torch.int8),
    }[left]
    settings = config(bits, 64, symmetric=True)
    scheme = read(settings, tensors, tmp_path if known else None, values.float() * scale)
    assert scheme.symmetric == "symmetric: true"


def test_symmetric_files_without_zero_points_need_no_room_for_them(tmp_path: Path) -> None:
    tensors, _, _ = file(4, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    found = Described.of(config(4, 64, symmetric=True)).with_file(tmp_path).resolve(NAME)
    assert isinstance(found, CheckpointScheme)
    assert "weight_zero_point" not in {tensor.name for tensor in found.tensors}


@pytest.mark.parametrize(
    ("value", "symmetric", "complaint"),
    [(9, False, (-8, 9, -8, 7)), (3, True, (11, "symmetric: true", 8))],
)
def test_zero_points_that_cannot_be(
    value: int, symmetric: bool, complaint: tuple[object, ...]
) -> None:
    tensors, _, _ = file(4, 64)
    zero = torch.full((N, K // 64), value, dtype=torch.int8)
    if not symmetric:
        zero[0, 0] = -8
    tensors[f"{NAME}.weight_zero_point"] = zero
    scheme = Described.of(groups((["Linear"], {**INT4, "group_size": 64, "symmetric": symmetric})))
    resolved = scheme.resolve(NAME)
    assert isinstance(resolved, CheckpointScheme)
    with pytest.raises(CheckpointError, match=saying(f"{NAME}.weight_zero_point", *complaint)):
        refine([load(source_of(NAME, resolved, N, K), tensors)], CONTEXT)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("order", [None, "weight", "group"])
def test_an_order_of_channels_counts_whatever_the_configuration_says(
    order: str | None, known: bool, tmp_path: Path
) -> None:
    """``-1`` throughout is how the library writes that there is none."""
    tensors, values, scale = file(4, 64)
    settings = config(4, 64, symmetric=True)
    settings["config_groups"]["group_0"]["weights"]["actorder"] = order
    tensors[f"{NAME}.weight_g_idx"] = torch.full((K,), -1, dtype=torch.int32)
    read(settings, tensors, tmp_path if known else None, values.float() * scale)
    index = torch.arange(K)[torch.randperm(K, generator=torch.Generator().manual_seed(2))] // 64
    tensors[f"{NAME}.weight_g_idx"] = index.to(torch.int32)
    expected = values.float() * tensors[f"{NAME}.weight_scale"][:, index]
    read(settings, tensors, tmp_path if known else None, expected)


def test_an_order_of_channels_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    """Without it the channels would be read in order, which is wrong for every group."""
    tensors, _, _ = file(4, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    settings = config(4, 64, symmetric=True)
    settings["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    described = Described.of(settings).with_file(tmp_path)
    with pytest.raises(ConfigError, match=saying(NAME, "actorder", "weight_g_idx")):
        described.resolve(NAME)
