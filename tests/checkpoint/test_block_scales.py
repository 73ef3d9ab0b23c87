# SPDX-License-Identifier: Apache-2.0
"""Rows that share scales: what descriptors say of them, and that preparation stays the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cpu_library import ISAS
from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.backends.cpu.weight_only import CpuBackend
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.backends.triton.backend import TritonBackend
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import Part, refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.commands.tune.random_weights import random_weights
from vllm.compressed_linear.spec.descriptor import (
    CompressedLinearDescriptor,
    ScaleSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import E4M3, uint
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights, StoredTensor
from vllm.compressed_linear.testing.data import load_shard
from vllm.compressed_linear.testing.suite import FP8_BLOCK

CONTEXT = LayerContext("bfloat16", "bfloat16")
CODES = StoredTensor("weight", Role.CODES, "float8_e4m3fn", ("N", "K"))
SCALES = StoredTensor("weight_scale", Role.SCALE, "float32", ("B", "G"))
GROUP = 32


def shard(
    rows: int,
    full_n: int = 64,
    n_start: int = 0,
    n: int | None = None,
    *,
    k: tuple[int, int, int] = (64, 0, 64),
    padding: int = 0,
    first_scale: int = 1,
) -> LoadedShard:
    """Rows [n_start, n_start + n) of a member of a fused layer, with scales in blocks of ``rows``
    × ``GROUP``, all different: ``first_scale`` and the numbers after it. ``k``: of the member, and
    where this rank's channels begin, and how many they are."""
    full_k, k_start, own_k = k
    spec = WeightSpec(E4M3, ScaleSpec("float32", "block", GROUP, rows))
    scheme = CheckpointScheme(spec, (CODES, SCALES))
    blocks, groups = -(-full_n // rows), -(-full_k // GROUP)
    scale = torch.arange(first_scale, first_scale + blocks * groups, dtype=torch.float32)
    standard = StandardWeights(
        torch.randint(0, 64, (full_n, full_k), dtype=torch.uint8),
        scale.reshape(blocks, groups).repeat_interleave(rows, 0)[:full_n],
        None,
    )
    own_n = full_n - n_start if n is None else n
    source = ShardSource("layer", scheme, full_n, full_k, n_start, own_n, k_start, own_k, padding)
    return load_shard(source, from_standard_layout(scheme, standard))


def only(*shards: LoadedShard) -> Part:
    (part,) = refine(shards, CONTEXT)
    return part


def blocks_of(part: Part) -> tuple[int, int] | None:
    """(rows, channels) that share a scale by the descriptor, None for single rows."""
    scale = part.descriptor.weight.scale
    assert scale is not None
    if scale.granularity != "block":
        assert scale.block_rows == 1
        return None
    return scale.block_rows, part.descriptor.group_size


def rows_share(part: Part, rows: int) -> bool:
    """Whether every run of ``rows`` rows has one row of scales, by the numbers."""
    scale, _ = part.weights.scales(0, part.weights.n)
    assert scale is not None
    first = torch.arange(part.weights.n) // rows * rows
    return torch.equal(scale, scale[first])


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ([shard(16)], (16, 32)),
        ([shard(16, 40)], (16, 32)),
        ([shard(16, 64, 32, 16)], (16, 32)),
        ([shard(16, 40, 16, 24)], None),
        ([shard(16, 64, 32, 24)], None),
        ([shard(16, 64, 8, 32)], None),
        ([shard(16, 64, 8, 8)], None),
        ([shard(16, 32), shard(16, 16, first_scale=100)], (16, 32)),
        ([shard(16, 32), shard(16, 24, first_scale=100)], (16, 32)),
        ([shard(16, 24), shard(16, 32, first_scale=100)], None),
        ([shard(16, 64, 16, 16), shard(16, 64, 24, 16, first_scale=100)], None),
        ([shard(16, 32, padding=5)], (16, 32)),
        ([shard(16, 24, padding=8)], None),
        ([shard(16, 32, padding=16), shard(16, first_scale=100)], (16, 32)),
        ([shard(16, 32, padding=8), shard(16, first_scale=100)], None),
        ([shard(1)], None),
        ([shard(16), shard(8, first_scale=100)], None),
    ],
)
def test_blocks_are_said_where_rows_share_scales(
    shards: list[LoadedShard], expected: tuple[int, int] | None
) -> None:
    part = only(*shards)
    assert blocks_of(part) == expected
    if expected is not None:
        assert rows_share(part, expected[0])


@pytest.mark.parametrize(
    ("k", "channels"),
    [
        ((64, 0, 64), 32),
        ((32, 0, 32), 32),
        ((20, 0, 20), 20),
        ((80, 0, 80), 16),
        ((128, 64, 64), 32),
        ((128, 48, 64), 16),
    ],
    ids=["whole", "one group", "less than a group", "short last group", "slice", "cut group"],
)
def test_groups_are_split_as_without_blocks(k: tuple[int, int, int], channels: int) -> None:
    assert blocks_of(only(shard(16, k=k))) == (16, channels)


@st.composite
def fused(draw: st.DrawFn) -> tuple[int, list[LoadedShard]]:
    rows = draw(st.sampled_from([2, 4, 16]))
    shards = []
    for number in range(draw(st.integers(1, 3))):
        full_n = draw(st.sampled_from([4, 8, 16, 20, 32, 48]))
        start = draw(st.sampled_from([s for s in (0, 2, 4, 16, 32) if s < full_n]))
        n = draw(st.sampled_from([c for c in (2, 4, 16, 18, 32, 48) if c <= full_n - start]))
        padding = draw(st.sampled_from([0, 0, 0, 2, 16]))
        shards.append(shard(rows, full_n, start, n, padding=padding, first_scale=1000 * number + 1))
    return rows, shards


@given(fused())
def test_blocks_are_said_exactly_where_rows_share_scales_and_no_slice_cuts_them(
    found: tuple[int, list[LoadedShard]],
) -> None:
    """All scales are different, so the numbers tell which rows share them."""
    rows, shards = found
    part = only(*shards)
    sources = [one.source for one in shards]
    cut = any(s.n_start % rows or (s.n < s.full_n and s.n % rows) for s in sources)
    assert (blocks_of(part) is not None) == (rows_share(part, rows) and not cut)


@pytest.mark.parametrize("n", [16, 24, 32, 40])
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_say_the_same(n: int, ranks: int) -> None:
    found = {blocks_of(only(shard(16, n * ranks, n * rank, n))) for rank in range(ranks)}
    assert found == {None if n % 16 else (16, 32)}


def test_zero_points_are_of_rows() -> None:
    """A zero point for each row is not said by a block of scales."""
    spec = WeightSpec(
        uint(4), ScaleSpec("float32", "block", GROUP, 16), ZeroSpec("integer", "uint8")
    )
    codes = StoredTensor("weight", Role.CODES, "uint8", ("N", "K"))
    zeros = StoredTensor("zero", Role.ZERO, "uint8", ("N", "G"))
    scheme = CheckpointScheme(spec, (codes, SCALES, zeros))
    standard = StandardWeights(
        torch.randint(0, 16, (32, 64), dtype=torch.uint8),
        torch.ones(32, 2),
        torch.arange(64, dtype=torch.uint8).reshape(32, 2) % 16,
    )
    source = ShardSource("layer", scheme, 32, 64, 0, 32, 0, 64)
    part = only(load_shard(source, from_standard_layout(scheme, standard)))
    assert blocks_of(part) is None


@pytest.mark.needs_vllm
def test_the_descriptor_says_it_and_can_be_written() -> None:
    from vllm.compressed_linear.commands.explain.text import in_words

    d = only(shard(16, 40)).descriptor
    assert "block 16x32" in str(d)
    assert "blocks of 16x32 (float32)" in in_words(d)
    assert CompressedLinearDescriptor.from_json(d.to_json()) == d


def test_random_weights_share_scales_as_the_descriptor_says() -> None:
    d = only(shard(16, 40)).descriptor
    made = random_weights(d)
    part = Part(0, d, made)
    assert rows_share(part, 16)
    assert not rows_share(part, 32)
    assert made.rows(0, d.n).codes.shape == (40, 64)


@pytest.mark.parametrize(
    "backend",
    [
        ReferenceBackend,
        TritonBackend,
        pytest.param(CpuBackend, marks=pytest.mark.skipif(not ISAS, reason="not built")),
    ],
)
@pytest.mark.parametrize("n", [160, 384])
def test_what_is_prepared_is_the_same_as_for_groups(
    backend: type[QuantLinearMethod], n: int
) -> None:
    problem = replace(FP8_BLOCK, n=n, shards=()).build()
    d = problem.descriptor
    assert d.weight.scale == ScaleSpec("float32", "block", 128, 128)
    grouped = replace(d, weight=replace(d.weight, scale=ScaleSpec("float32", "group", 128)))
    made = [
        backend(one).prep_weights_for_execution(weights)
        for one, weights in ((d, problem.weights), (grouped, problem.own))
    ]
    assert made[0].keys() == made[1].keys()
    for name, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][name], rtol=0, atol=0, equal_nan=True)
    assert backend.prepared_bytes(d) == backend.prepared_bytes(grouped)
