# SPDX-License-Identifier: Apache-2.0
"""Weights from any checkpoint layout to standard layout and back, in shards and in chunks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.messages import saying
from tests.support.strategies import Weight, weights
from vllm.compressed_linear.checkpoint import weights as module
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.weights import CHUNK_BYTES, to_standard_layout
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.spec.descriptor import ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.spec.elements import BF16, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights, StoredTensor
from vllm.compressed_linear.testing.data import load_shard

CONTEXT = LayerContext("bfloat16", "bfloat16")


def shard_of(weight: Weight, n: slice | None = None, k: slice | None = None) -> LoadedShard:
    """What a rank that holds rows ``n`` and channels ``k`` of ``weight`` loads."""
    full_n, full_k = weight.standard.codes.shape
    n, k = n or slice(0, full_n), k or slice(0, full_k)
    source = ShardSource(
        "layer", weight.scheme, full_n, full_k, n.start, n.stop - n.start, k.start, k.stop - k.start
    )
    tensors = from_standard_layout(weight.scheme, weight.standard, weight.group_index)
    return load_shard(source, tensors)


@given(weights())
def test_from_standard_layout_is_the_inverse(weight: Weight) -> None:
    shard = shard_of(weight)
    n = weight.standard.codes.shape[0]
    assert torch.equal(shard.codes(0, n), weight.standard.codes)
    assert shard.scale() is not None
    assert weight.standard.scale is not None
    assert torch.equal(shard.scale(), weight.standard.scale)  # type: ignore[arg-type]
    if weight.standard.zero is None:
        assert shard.zero() is None
    else:
        assert torch.equal(shard.zero(), weight.standard.zero)  # type: ignore[arg-type]
    assert torch.equal(shard.group_index(), weight.channel_groups)
    whole = from_standard_layout(weight.scheme, weight.standard, weight.group_index)
    for stored in weight.scheme.tensors:
        assert tuple(whole[stored.name].shape) == stored.shape(shard.source.extents)
        kept = shard.source.kept_shape(stored, stored.packing)
        assert tuple(shard.tensors[stored.name].shape) == kept


@given(weights(), st.data())
def test_a_rank_s_part_means_what_it_meant_in_the_whole(
    weight: Weight, data: st.DataObject
) -> None:
    """Rows and channels cut anywhere, also inside packed words and inside groups."""
    n, k = weight.standard.codes.shape
    rows = sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2)))
    channels = sorted(data.draw(st.lists(st.integers(0, k), min_size=2, max_size=2)))
    if channels[0] == channels[1]:
        return
    shard = shard_of(weight, slice(*rows), slice(*channels))
    expected = weight.exact()[slice(*rows), slice(*channels)]
    got = shard.dequantize(0, rows[1] - rows[0]).double()
    assert got.shape == expected.shape
    magnitude = weight.standard.codes.double().max() * 4 + 256
    assert bool(((got - expected).abs() <= 2.0**-23 * magnitude).all())


@given(weights(), st.data())
def test_rows_are_the_same_in_any_chunks(weight: Weight, data: st.DataObject) -> None:
    """Standard rows, gathered back and dequantized, equal the stored meaning to the last bit."""
    (part,) = refine([shard_of(weight)], CONTEXT)
    n, k = weight.standard.codes.shape
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))})
    pieces = [part.weights.rows(a, b) for a, b in itertools.pairwise(cuts)]
    codes = torch.cat([p.codes for p in pieces])
    scale = torch.cat([p.scale for p in pieces if p.scale is not None]).float()
    values = part.descriptor.weight.element.decode(codes)
    size = part.descriptor.group_size
    assert codes.shape == (n, part.descriptor.k)
    assert scale.shape == (n, part.descriptor.groups)
    if part.descriptor.weight.zero is not None:
        zero = torch.cat([p.zero for p in pieces if p.zero is not None]).float()
        values = values - zero.repeat_interleave(size, 1)
    values = values * scale.repeat_interleave(size, 1)
    order = torch.arange(k) if part.weights.permutation is None else part.weights.permutation.long()
    back = torch.empty(n, k)
    back[:, order[order >= 0]] = values[:, order >= 0]
    assert torch.equal(back, part.weights.dequantize(0, n))


@given(weights(), st.integers(0, 5))
def test_padded_rows_are_zero(weight: Weight, padding: int) -> None:
    shard = shard_of(weight)
    n, k = weight.standard.codes.shape
    source = ShardSource("layer", weight.scheme, n, k, 0, n, 0, k, padding)
    (part,) = refine([LoadedShard(source, shard.tensors)], CONTEXT)
    assert part.descriptor.n == part.weights.n == n + padding
    standard = to_standard_layout(part.descriptor, part.weights)
    assert standard.codes.shape[0] == n + padding
    assert standard.scale is not None
    assert not standard.scale[n:].any()
    assert not part.weights.dequantize(n, n + padding).any()
    assert torch.equal(part.weights.dequantize(0, n), shard.dequantize(0, n))


def plain_scheme(bits: int = 4, group: int = 32, axes: tuple[str, str] = ("N", "K")) -> Weight:
    spec = WeightSpec(uint(bits), ScaleSpec("float16", "group", group), ZeroSpec("integer", "u8"))
    tensors = (
        StoredTensor("codes", Role.CODES, "int32", axes, Packing(bits)),
        StoredTensor("scale", Role.SCALE, "float16", ("N", "G")),
        StoredTensor("zero", Role.ZERO, "int32", ("N", "G"), Packing(bits, "N")),
        StoredTensor("shape", Role.SHAPE, "int64", (2,), optional=True),
    )
    standard = StandardWeights(
        torch.randint(1 << bits, (64, 96), dtype=torch.uint8),
        torch.rand(64, 96 // group).half() + 1,
        torch.randint(1 << bits, (64, 96 // group), dtype=torch.uint8),
    )
    return Weight(CheckpointScheme(spec, tensors), standard, None)


def test_what_a_scheme_cannot_say_is_refused() -> None:
    weight = plain_scheme()
    with pytest.raises(ValueError, match="no tensor for one"):
        from_standard_layout(weight.scheme, weight.standard, torch.arange(96) % 3)
    codes = weight.standard.codes
    with pytest.raises(ValueError, match=saying("scale")):
        from_standard_layout(weight.scheme, StandardWeights(codes, None, weight.standard.zero))
    shared = StoredTensor("scale", Role.SCALE, "float16", (1,))
    scheme = CheckpointScheme(weight.scheme.weight, (weight.scheme.tensors[0], shared))
    with pytest.raises(ValueError, match=saying("scale", "(1,)", "differ")):
        from_standard_layout(scheme, weight.standard)
    assert from_standard_layout(weight.scheme, weight.standard)["shape"].tolist() == [64, 96]


def test_shared_scales_are_spread() -> None:
    codes = torch.randint(16, (6, 64), dtype=torch.uint8)
    for axes, shape in (((1,), (1,)), (("N",), (6,)), (("N", "G"), (6, 1))):
        spec = WeightSpec(uint(4, 8), ScaleSpec("float32", "channel"))
        scheme = CheckpointScheme(
            spec,
            (
                StoredTensor("codes", Role.CODES, "int32", ("N", "K"), Packing(4)),
                StoredTensor("scale", Role.SCALE, "float32", axes),
            ),
        )
        scale = torch.full((6, 1), 0.5)
        tensors = from_standard_layout(scheme, StandardWeights(codes, scale, None))
        assert tensors["scale"].shape == shape
        shard = load_shard(ShardSource("layer", scheme, 6, 64, 0, 6, 0, 64), tensors)
        assert torch.equal(shard.dequantize(0, 6), (codes.float() - 8) * 0.5)


def test_dense_weights_pass_through() -> None:
    scheme = CheckpointScheme(
        WeightSpec(BF16), (StoredTensor("weight", Role.CODES, "bfloat16", ("N", "K")),)
    )
    values = torch.randn(10, 7).bfloat16()
    tensors = from_standard_layout(scheme, StandardWeights(values, None, None))
    source = ShardSource("layer", scheme, 10, 7, 2, 5, 3, 4)
    (part,) = refine([load_shard(source, tensors)], CONTEXT)
    standard = to_standard_layout(part.descriptor, part.weights)
    assert torch.equal(standard.codes, values[2:7, 3:7])
    assert standard.scale is None
    assert standard.zero is None


def test_a_group_index_out_of_range_names_tensor_and_layer() -> None:
    spec = WeightSpec(uint(4, 8), ScaleSpec("float16", "group", 32))
    scheme = CheckpointScheme(
        spec,
        (
            StoredTensor("codes", Role.CODES, "int32", ("N", "K"), Packing(4)),
            StoredTensor("scales", Role.SCALE, "float16", ("N", "G")),
            StoredTensor("g_idx", Role.GROUP_INDEX, "int32", ("K",)),
        ),
    )
    standard = StandardWeights(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2).half(), None)
    for bad in (2, -1):
        index = torch.arange(64) // 32
        index[7] = bad
        tensors = from_standard_layout(scheme, standard, index)
        shard = load_shard(ShardSource("model.layer.q", scheme, 4, 64, 0, 4, 0, 64), tensors)
        message = saying("model.layer.q.g_idx", min(bad, 0), max(bad, 1), 0, 1)
        with pytest.raises(CheckpointError, match=message):
            refine([shard], CONTEXT)


def test_chunks_cover_all_rows_and_begin_at_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = plain_scheme()
    (part,) = refine([shard_of(weight)], CONTEXT)
    monkeypatch.setattr(module, "CHUNK_BYTES", 96 * 10)
    assert list(part.weights.chunks()) == [(a, min(a + 10, 64)) for a in range(0, 64, 10)]
    assert list(part.weights.chunks(16)) == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert next(part.weights.chunks(4)) == (0, 8)
    whole = part.weights.rows(0, 64)
    standard = to_standard_layout(part.descriptor, part.weights)
    assert torch.equal(standard.codes, whole.codes)


def test_to_standard_layout_refuses_the_weights_of_another_layer() -> None:
    (one,) = refine([shard_of(plain_scheme())], CONTEXT)
    (other,) = refine([shard_of(plain_scheme(), n=slice(0, 32))], CONTEXT)
    with pytest.raises(ValueError, match=saying("32x96", "64x96")):
        to_standard_layout(one.descriptor, other.weights)


def peak_bytes(profile: torch.profiler.profile) -> int:
    """Largest sum of live allocations of the CPU allocator while ``profile`` ran."""
    live = peak = 0
    assert profile.profiler is not None
    results: Any = profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    assert events
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("bits", "axes", "packed"),
    [(4, ("N", "K"), "K"), (3, ("N", "K"), "K"), (3, ("K", "N"), "K"), (4, ("K", "N"), "N")],
)
def test_rows_take_memory_for_a_chunk_only(
    bits: int, axes: tuple[str, str], packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk may take a few times its own size, whatever the size of the matrix."""
    chunk, n, k = 1 << 20, 8192, 2048
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    spec = WeightSpec(uint(bits, 1 << (bits - 1)), ScaleSpec("float16", "group", 128))
    packing = Packing(bits, packed)
    stored = StoredTensor("codes", Role.CODES, "int32", axes, packing)
    scheme = CheckpointScheme(
        spec, (stored, StoredTensor("scale", Role.SCALE, "float16", ("N", "G")))
    )
    source = ShardSource("layer", scheme, n, k, 0, n, 0, k)
    tensors = {
        "codes": torch.randint(2**31, stored.shape(source.extents), dtype=torch.int32),
        "scale": torch.ones(n, k // 128).half(),
    }
    (part,) = refine([LoadedShard(source, tensors)], CONTEXT)
    part.weights.rows(0, 1)  # scales are kept from the first call on
    total = 0
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        for start, stop in part.weights.chunks(16):
            total += part.weights.rows(start, stop).codes.numel()
    assert total == n * k == 16 * chunk
    # The promise is at most 64 MiB beside the result.
    assert 4 * CHUNK_BYTES <= 64 << 20
    assert chunk < peak_bytes(profile) < 4 * chunk
