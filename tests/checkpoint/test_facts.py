# SPDX-License-Identifier: Apache-2.0
"""What only the data tells: which shards are alike, what is trivial, what is damaged."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.messages import saying, says
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import Part, refine
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.spec.descriptor import ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.spec.elements import BF16, FP16, dense, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights, StoredTensor
from vllm.compressed_linear.testing.data import load_shard

CONTEXT = LayerContext("bfloat16", "bfloat16", "float32")
K = 128


def shard(
    name: str = "model.q_proj",
    *,
    n: int = 16,
    bits: int = 4,
    group: int = 32,
    zero: torch.Tensor | float | None = None,
    scale: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    padding: int = 0,
) -> LoadedShard:
    """A GPTQ-like shard; ``zero`` a number fills all zero points with it."""
    groups = K // group
    if scale is None:
        scale = torch.rand(n, groups).half() + 0.5
    if codes is None:
        codes = torch.randint(1 << bits, (n, K), dtype=torch.uint8)
    points = zero
    if isinstance(zero, float | int):
        points = torch.full((n, groups), zero, dtype=torch.uint8)
    assert points is None or isinstance(points, torch.Tensor)
    element = uint(bits) if points is not None else uint(bits, 1 << (bits - 1))
    kind = "float" if points is not None and points.is_floating_point() else "integer"
    spec = WeightSpec(
        element,
        ScaleSpec("float16", "group", group),
        None if points is None else ZeroSpec(kind, "uint8"),
    )
    tensors = [
        StoredTensor("qweight", Role.CODES, "int32", ("K", "N"), Packing(bits)),
        StoredTensor("scales", Role.SCALE, "float16", ("G", "N")),
        StoredTensor("g_idx", Role.GROUP_INDEX, "int32", ("K",)),
    ]
    if points is not None:
        packing = None if kind == "float" else Packing(bits, "N")
        tensors.append(StoredTensor("qzeros", Role.ZERO, "int32", ("G", "N"), packing))
    scheme = CheckpointScheme(spec, tuple(tensors))
    source = ShardSource(name, scheme, n, K, 0, n, 0, K, padding)
    return load_shard(
        source, from_standard_layout(scheme, StandardWeights(codes, scale, points), index)
    )


def dense_shard(dtype: torch.dtype = torch.bfloat16, n: int = 8) -> LoadedShard:
    element = dense(dtype)
    scheme = CheckpointScheme(
        WeightSpec(element),
        (StoredTensor("weight", Role.CODES, str(dtype)[6:], ("N", "K")),),
    )
    source = ShardSource("model.v_proj", scheme, n, K, 0, n, 0, K)
    return load_shard(source, {"weight": torch.randn(n, K).to(dtype)})


def whole(parts: list[LoadedShard]) -> torch.Tensor:
    return torch.cat([s.dequantize(0, s.source.n) for s in parts])


def shuffled(seed: int) -> torch.Tensor:
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    return (torch.arange(K) // 32)[order]


def widths(part: Part) -> list[int]:
    """Output channels of each shard of ``part``."""
    return [shard.source.n for shard in part.weights.shards]


def test_alike_shards_become_one_part() -> None:
    shards = [shard(n=16), shard(n=8), shard(n=24)]
    (part,) = refine(shards, CONTEXT)
    assert part.start == 0
    d = part.descriptor
    assert (d.n, d.k, widths(part)) == (48, K, [16, 8, 24])
    assert (d.input_dtype, d.bias_dtype) == ("bfloat16", "float32")
    assert d.channel_order is None
    assert torch.equal(part.weights.dequantize(0, 48), whole(shards))


ROW_PARALLEL = [{"k_start": rank * K // 2, "k": K // 2} for rank in range(2)]
COLUMN_PARALLEL = [{"n_start": rank * 8, "n": 8} for rank in range(2)]


@pytest.mark.parametrize(
    "slices", [ROW_PARALLEL, COLUMN_PARALLEL], ids=["row parallel", "column parallel"]
)
@pytest.mark.parametrize("zero", [None, 8, 3], ids=["symmetric", "middle", "asymmetric"])
@pytest.mark.parametrize("fused", [1, 2])
def test_ranks_with_equal_work_have_equal_descriptors(
    slices: list[dict[str, int]], zero: int | None, fused: int
) -> None:
    stored = [shard(n=16, zero=zero) for _ in range(fused)]
    first, second = (
        refine([load_shard(replace(s.source, **own), s.tensors) for s in stored], CONTEXT)
        for own in slices
    )
    assert [p.descriptor for p in first] == [p.descriptor for p in second]
    assert len({p.descriptor for p in (*first, *second)}) == 1
    assert not torch.equal(first[0].weights.dequantize(0, 8), second[0].weights.dequantize(0, 8))


def test_equal_work_has_equal_descriptors_however_it_is_cut_into_shards() -> None:
    (one,) = refine([shard(n=24)], CONTEXT)
    (several,) = refine([shard(n=16), shard(n=8)], CONTEXT)
    assert one.descriptor == several.descriptor


@pytest.mark.parametrize(
    "other",
    [
        shard(bits=8),
        shard(group=64),
        shard(scale=torch.rand(16, 4).bfloat16() + 1),
        shard(zero=3),
        shard(index=shuffled(1)),
        shard(index=(torch.arange(K) // 32).flip(0)),
        dense_shard(),
    ],
    ids=["bits", "group", "scale dtype", "zero points", "act order", "group order", "dense"],
)
def test_unlike_shards_stay_apart(other: LoadedShard) -> None:
    first, last = shard(n=8), shard(n=24)
    parts = refine([first, other, last], CONTEXT)
    assert [p.start for p in parts] == [0, 8, 8 + other.source.n]
    assert [widths(p) for p in parts] == [[8], [other.source.n], [24]]
    assert [p.descriptor.n for p in parts] == [8, other.source.n, 24]
    assert parts[0].descriptor.weight == parts[2].descriptor.weight
    assert parts[1].descriptor != parts[0].descriptor
    for part, source in zip(parts, [first, other, last], strict=True):
        n = source.source.n
        assert torch.equal(part.weights.dequantize(0, n), source.dequantize(0, n))
    # Neighbours that are alike still merge.
    assert len(refine([other, first, last], CONTEXT)) == 2


def test_shards_with_the_same_order_merge_and_others_do_not() -> None:
    one, same, other = (shard(index=shuffled(seed)) for seed in (1, 1, 2))
    (part,) = refine([one, same], CONTEXT)
    assert part.descriptor.channel_order is not None
    assert part.weights.permutation is not None
    assert len(refine([one, other], CONTEXT)) == 2


def test_trivial_facts_vanish() -> None:
    """A sorted g_idx is no activation order; zero points in the middle are none."""
    (part,) = refine([shard(zero=8, index=torch.arange(K) // 32)], CONTEXT)
    assert part.descriptor.weight.zero is None
    assert part.descriptor.weight.element == uint(4, 8)
    assert part.descriptor.channel_order is None
    assert part.weights.rows(0, 4).zero is None
    assert part.descriptor.weight.scale == ScaleSpec("float16", "group", 32)


def test_folding_zero_points_changes_no_number() -> None:
    for bits in range(1, 9):
        folds = shard(bits=bits, zero=1 << (bits - 1))
        (part,) = refine([folds], CONTEXT)
        rows, element = part.weights.rows(0, 16), part.descriptor.weight.element
        assert rows.scale is not None
        values = element.decode(rows.codes) * rows.scale.float().repeat_interleave(32, 1)
        assert element == uint(bits, 1 << (bits - 1))
        assert torch.equal(values, folds.dequantize(0, 16))


def test_one_zero_point_beside_the_middle_keeps_them_all() -> None:
    zero = torch.full((16, 4), 8, dtype=torch.uint8)
    zero[15, 3] = 7
    (part,) = refine([shard(zero=zero)], CONTEXT)
    assert part.descriptor.weight.zero == ZeroSpec("integer", "uint8")
    assert part.descriptor.weight.element == uint(4)
    assert torch.equal(part.weights.rows(0, 16).zero, zero)  # type: ignore[arg-type]


def test_float_zero_points_keep_their_dtype() -> None:
    (part,) = refine([shard(zero=torch.rand(16, 4).bfloat16() * 9)], CONTEXT)
    assert part.descriptor.weight.zero == ZeroSpec("float", "bfloat16")


def test_one_group_is_a_scale_per_channel() -> None:
    (part,) = refine([shard(group=K)], CONTEXT)
    assert part.descriptor.weight.scale == ScaleSpec("float16", "channel")


def test_the_scale_s_dtype_is_the_one_that_is_there() -> None:
    (part,) = refine([shard(scale=torch.rand(16, 4) + 1)], CONTEXT)
    assert part.descriptor.weight.scale is not None
    assert part.descriptor.weight.scale.dtype == "float32"


def test_dense_shards_of_one_dtype_merge() -> None:
    parts = refine([dense_shard(), dense_shard(), dense_shard(torch.float16)], CONTEXT)
    assert [(p.start, p.descriptor.n, p.descriptor.weight.element) for p in parts] == [
        (0, 16, BF16),
        (16, 8, FP16),
    ]


def test_padding_counts_as_rows() -> None:
    (part,) = refine([shard(n=10, padding=6)], CONTEXT)
    assert part.descriptor.n == 16
    assert part.weights.rows(8, 16).codes.shape == (8, K)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scales_that_are_not_finite(bad: float) -> None:
    scale = torch.rand(16, 4).half() + 1
    scale[5, 2] = bad
    with pytest.raises(CheckpointError) as caught:
        refine([shard(), shard("model.layers.3.k_proj", scale=scale)], CONTEXT)
    text = str(caught.value)
    assert text.startswith("model.layers.3.k_proj.scales: ")
    assert says(text, 1, 64, "finite", bad, "channel 5", "group 2")


def test_zero_points_that_are_not_finite() -> None:
    zero = torch.rand(16, 4)
    zero[3, 1] = math.nan
    with pytest.raises(CheckpointError, match=saying("model.k.qzeros", 1, 64, "zero points", 3)):
        refine([shard("model.k", zero=zero)], CONTEXT)


@pytest.mark.parametrize("zero", [None, 3], ids=["symmetric", "asymmetric"])
def test_a_zero_scale_is_damage_over_codes_and_none_over_a_dead_group(zero: int | None) -> None:
    scale = torch.rand(16, 4).half() + 1
    scale[5, 2] = 0
    codes = torch.randint(16, (16, K), dtype=torch.uint8)
    codes[5, 64:96] = 8 if zero is None else zero
    (part,) = refine([shard(scale=scale, codes=codes, zero=zero)], CONTEXT)
    assert not part.weights.dequantize(5, 6)[0, 64:96].any()
    codes[5, 70] = 9
    with pytest.raises(
        CheckpointError, match=saying("model.k.scales", "scale", 0, "channel 5", "group 2")
    ):
        refine([shard("model.k", scale=scale, codes=codes, zero=zero)], CONTEXT)


def test_many_zero_scales_are_looked_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.compressed_linear.checkpoint.validation.CHUNK_BYTES", 16 * K * 5)
    codes = torch.full((64, K), 8, dtype=torch.uint8)
    scale = torch.zeros(64, 4).half()
    scale[10:15] = 1
    refine([shard(n=64, scale=scale, codes=codes)], CONTEXT)
    codes[12], codes[33, 127] = 3, 3
    with pytest.raises(CheckpointError, match=saying("scale", 0, "channel 33", "group 3")):
        refine([shard(n=64, scale=scale, codes=codes)], CONTEXT)


def test_a_zero_scale_follows_the_group_index() -> None:
    index = shuffled(4)
    scale = torch.rand(16, 4).half() + 1
    scale[0, 3] = 0
    codes = torch.full((16, K), 9, dtype=torch.uint8)
    codes[0, index == 3] = 8
    refine([shard(scale=scale, codes=codes, index=index)], CONTEXT)
    codes[0, (index == 3).nonzero()[0]] = 9
    with pytest.raises(CheckpointError, match=saying("scale", 0, "channel 0", "group 3")):
        refine([shard(scale=scale, codes=codes, index=index)], CONTEXT)


@pytest.mark.parametrize("bad", [-1, 4, 1000])
def test_group_indices_out_of_range(bad: int) -> None:
    index = torch.arange(K) // 32
    index[77] = bad
    with pytest.raises(
        CheckpointError, match=saying("model.k.g_idx", min(bad, 0), max(bad, 3), 0, 3)
    ):
        refine([shard("model.k", index=index)], CONTEXT)


def test_scales_zero_points_and_group_index_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refinement, preparation of all rows, and no second look at either."""
    calls = []
    for name in ("scale", "zero", "group_index"):
        original = getattr(LoadedShard, name)

        def counted(self: LoadedShard, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(self)

        monkeypatch.setattr(LoadedShard, name, counted)
    generator = torch.Generator().manual_seed(3)
    index = (torch.arange(K) // 32)[torch.randperm(K, generator=generator)]
    (part,) = refine([shard(zero=3, index=index)], CONTEXT)
    for start, stop in ((0, 5), (5, 16)):
        part.weights.rows(start, stop)
    assert sorted(calls) == ["group_index", "scale", "zero"]
