# SPDX-License-Identifier: Apache-2.0
"""Weights of small floats: scales in blocks, as e4m3 and e8m0, and of a second level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.support.messages import saying
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parameter import collect_shards, create_parameters
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.weights import to_standard_layout
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    ScaleSpec,
    TransformSpec,
    WeightSpec,
)
from vllm.compressed_linear.spec.elements import E2M1, E4M3, INT8, ElementType
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights, StoredTensor
from vllm.compressed_linear.testing.data import load_shard

CONTEXT = LayerContext("bfloat16", "bfloat16")
N, K = 40, 96
FP8_CODES = StoredTensor("weight", Role.CODES, "float8_e4m3fn", ("N", "K"))
INT8_PACKING = Packing(8, "K", "int8", signed=True)
FP4_CODES = StoredTensor("weight", Role.CODES, "uint8", ("N", "K"), Packing(4, "K", "uint8"))
GLOBAL = StoredTensor("weight_global_scale", Role.ROW_SCALE, "float32", (1,), reciprocal=True)


@dataclass(frozen=True)
class Kind:
    """One way that checkpoints hold small floats. ``second``: "tensor" or "channel", where scales
    have a second level."""

    element: ElementType
    scale: ScaleSpec
    tensors: tuple[StoredTensor, ...]
    second: str = ""

    @property
    def scheme(self) -> CheckpointScheme:
        row_scale = "float32" if self.second else None
        return CheckpointScheme(
            WeightSpec(self.element, self.scale, row_scale=row_scale), self.tensors
        )


def scale_of(dtype: str, *axes: str | int, **more: Any) -> StoredTensor:
    return StoredTensor("weight_scale", Role.SCALE, dtype, axes, **more)


BLOCK = ScaleSpec("float32", "block", 32, 16)
KINDS = {
    "tensor": Kind(E4M3, ScaleSpec("float32", "tensor"), (FP8_CODES, scale_of("float32", 1))),
    "channel": Kind(
        E4M3, ScaleSpec("bfloat16", "channel"), (FP8_CODES, scale_of("bfloat16", "N", 1))
    ),
    "block": Kind(E4M3, BLOCK, (FP8_CODES, scale_of("float32", "B", "G"))),
    "block of four dimensions": Kind(E4M3, BLOCK, (FP8_CODES, scale_of("float32", "B", 1, "G", 1))),
    "block the other way round": Kind(E4M3, BLOCK, (FP8_CODES, scale_of("float32", "G", "B"))),
    "inverse block": Kind(E4M3, BLOCK, (FP8_CODES, scale_of("float32", "B", "G", reciprocal=True))),
    "mxfp8": Kind(E4M3, ScaleSpec("e8m0", "group", 32), (FP8_CODES, scale_of("e8m0", "N", "G"))),
    "mxfp4": Kind(E2M1, ScaleSpec("e8m0", "group", 32), (FP4_CODES, scale_of("e8m0", "N", "G"))),
    "mxint8": Kind(
        INT8,
        ScaleSpec("e8m0", "group", 32),
        (
            StoredTensor("weight", Role.CODES, "int8", ("N", "K"), INT8_PACKING),
            scale_of("e8m0", "N", "G"),
        ),
    ),
    "nvfp4": Kind(
        E2M1,
        ScaleSpec("float8_e4m3fn", "group", 16),
        (FP4_CODES, scale_of("float8_e4m3fn", "N", "G"), GLOBAL),
        "tensor",
    ),
    "two levels per channel": Kind(
        E2M1,
        ScaleSpec("float8_e4m3fn", "group", 16),
        (
            FP4_CODES,
            scale_of("float8_e4m3fn", "N", "G"),
            StoredTensor("weight_scale_2", Role.ROW_SCALE, "float32", ("N",)),
        ),
        "channel",
    ),
}


@dataclass
class Values:
    """What the tensors of a kind hold, and the float64 weight that is by definition."""

    standard: StandardWeights
    row_scale: torch.Tensor | None
    exact: torch.Tensor


def values(kind: Kind, seed: int = 0, n: int = N) -> Values:
    generator = torch.Generator().manual_seed(seed)
    element, spec = kind.element, kind.scale
    codes = torch.randint(1 << element.bits, (n, K), generator=generator, dtype=torch.uint8)
    codes = codes.masked_fill(~torch.isfinite(element.table())[codes.long()], 0)
    groups = kind.scheme.weight.groups(K)
    rows = 1 if spec.granularity == "tensor" else -(-n // spec.block_rows)
    exponents = torch.randint(-9, 5, (rows, groups), generator=generator)
    if spec.dtype == "e8m0":
        scale = (exponents + 127).to(torch.uint8)
        wide = torch.exp2(exponents.double())
    else:
        # Powers of two, so that a reciprocal loses nothing.
        wide = torch.exp2(exponents.double())
        scale = wide.to(elements.torch_dtype(spec.dtype))
    block = n if rows == 1 else spec.block_rows
    scale, wide = (t.repeat_interleave(block, 0)[:n] for t in (scale, wide))
    exact = element.decode(codes).double() * wide.repeat_interleave(-(-K // groups), 1)[:, :K]
    second = None
    if kind.second:
        count = 1 if kind.second == "tensor" else n
        second = torch.exp2(torch.randint(-9, 5, (count,), generator=generator).float()).expand(n)
        exact = exact * second.double().unsqueeze(1)
    return Values(StandardWeights(codes, scale, None), second, exact)


def stored(kind: Kind, seed: int = 0, n: int = N) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    held = values(kind, seed, n)
    tensors = from_standard_layout(kind.scheme, held.standard, row_scale=held.row_scale)
    return tensors, held.exact


@pytest.mark.parametrize("rows", [slice(0, N), slice(10, 37), slice(16, 17)], ids=str)
@pytest.mark.parametrize("channels", [slice(0, K), slice(8, 72)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_any_part_of_a_weight_means_what_it_meant(name: str, rows: slice, channels: slice) -> None:
    """Cut inside blocks of rows and inside groups, and given to a backend in standard layout."""
    kind = KINDS[name]
    tensors, exact = stored(kind)
    n, k = rows.stop - rows.start, channels.stop - channels.start
    source = ShardSource("layer", kind.scheme, N, K, rows.start, n, channels.start, k, 3)
    shard = load_shard(source, tensors)
    for tensor in kind.tensors:
        kept = tuple(shard.tensors[tensor.name].shape)
        assert kept == source.kept_shape(tensor, tensor.packing)
    expected = exact[rows, channels]
    assert torch.equal(shard.dequantize(0, n).double(), expected)
    assert torch.equal(shard.dequantize(1, n).double(), expected[1:])

    (part,) = refine([shard], CONTEXT)
    d = part.descriptor
    standard = to_standard_layout(d, part.weights)
    assert standard.codes.dtype == torch.uint8
    assert standard.scale is not None
    assert d.weight.scale is not None
    assert elements.scale_dtype_name(standard.scale.dtype) == d.weight.scale.dtype
    assert d.weight.scale.granularity in ("channel", "group", "block")
    scale = elements.widen_scale(standard.scale).repeat_interleave(d.group_size, 1)
    made = d.weight.element.decode(standard.codes) * scale
    if part.weights.row_scale is not None:
        assert part.weights.row_scale.dtype == torch.float32
        made = made * part.weights.row_scale.unsqueeze(1)
    assert (d.weight.row_scale is None) == (part.weights.row_scale is None)
    # Before the rows of padding, which are zero also where scales cannot be.
    back = torch.zeros(n + 3, k)
    order = part.weights.permutation
    if order is None:
        back = made
    else:
        back[:, order[order >= 0].long()] = made[:, order >= 0]
    assert torch.equal(back[:n].double(), expected)
    assert not back[n:].any()


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused on disk"])
@pytest.mark.parametrize("name", KINDS)
def test_shards_of_a_fused_layer_stay_one_part(name: str, fused: bool) -> None:
    """Each with its own scale of the tensor and of the second level."""
    kind, n = KINDS[name], 64
    sources = [ShardSource(f"layer.{i}", kind.scheme, n, K, 0, n, 0, K) for i in range(2)]
    made = [stored(kind, seed, n) for seed in range(2)]
    params = create_parameters(sources, "layer")
    for tensor in kind.tensors:
        both, param = [tensors[tensor.name] for tensors, _ in made], params[tensor.name]
        if fused:
            dim = next((tensor.axes.index(a) for a in ("N", "B") if a in tensor.axes), 0)
            param.weight_loader(param, torch.cat([t.reshape(t.shape or (1,)) for t in both], dim))
            continue
        for index, part in enumerate(both):
            param.weight_loader(param, part, index)
    (part,) = refine(collect_shards(params, sources), CONTEXT)
    expected = torch.cat([exact for _, exact in made])
    assert torch.equal(part.weights.dequantize(0, 2 * n).double(), expected)
    assert [shard.source.n for shard in part.weights.shards] == [n, n]


def test_exponents_may_come_in_their_own_dtype() -> None:
    kind = KINDS["mxfp8"]
    tensors, exact = stored(kind)
    tensors["weight_scale"] = tensors["weight_scale"].view(torch.float8_e8m0fnu)
    source = ShardSource("layer", kind.scheme, N, K, 0, N, 0, K)
    params = create_parameters([source], "layer")
    for name, param in params.items():
        param.weight_loader(param, tensors[name])
    (shard,) = collect_shards(params, [source])
    assert shard.scale().dtype == torch.uint8  # type: ignore[union-attr]
    assert torch.equal(shard.dequantize(0, N).double(), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.uint8], ids=str)
def test_codes_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    source = ShardSource("layer", KINDS["tensor"].scheme, N, K, 0, N, 0, K)
    param = create_parameters([source], "layer")["weight"]
    with pytest.raises(CheckpointError, match=saying("layer.weight", dtype, "float8_e4m3fn")):
        param.weight_loader(param, torch.zeros(N, K).to(dtype))


INT8_SCHEME = CheckpointScheme(
    WeightSpec(elements.uint(8, 128), ScaleSpec("float32", "channel")),
    (
        StoredTensor("weight", Role.CODES, "int8", ("N", "K"), INT8_PACKING),
        StoredTensor("weight_scale", Role.SCALE, "float32", ("N", 1)),
        StoredTensor("input_scale", Role.INPUT_SCALE, "float32", ()),
        StoredTensor("input_zero_point", Role.INPUT_ZERO, "int32", (1,), optional=True),
        StoredTensor("pre_quant_scale", Role.PRESCALE, "float32", ("K",), optional=True),
    ),
    ActivationSpec(INT8, False, "tensor", symmetric=False),
)


def static_shard(
    scheme: CheckpointScheme = INT8_SCHEME,
    k: slice = slice(0, K),
    **changes: torch.Tensor | None,
) -> LoadedShard:
    """A shard of static int8 activations with ``changes`` of its small tensors."""
    numbers: dict[str, torch.Tensor | None] = {
        "input_scale": torch.tensor(0.25),
        "input_zero": torch.tensor(-3),
        "prescale": torch.arange(1, K + 1).float(),
        **changes,
    }
    standard = StandardWeights(
        torch.full((N, K), 200, dtype=torch.uint8), torch.full((N, 1), 0.5), None
    )
    tensors = from_standard_layout(scheme, standard, **numbers)
    source = ShardSource("layer", scheme, N, K, 0, N, k.start, k.stop - k.start)
    return load_shard(source, tensors)


def test_what_the_input_needs_arrives() -> None:
    (part,) = refine([static_shard(k=slice(32, 64))] * 2, CONTEXT)
    assert part.descriptor.activation == INT8_SCHEME.activation
    assert part.descriptor.prescale == "float32"
    assert part.weights.input_scale is not None
    assert part.weights.input_scale.tolist() == [0.25]
    assert part.weights.input_zero is not None
    assert part.weights.input_zero.tolist() == [-3]
    assert part.weights.prescale is not None
    assert part.weights.prescale.tolist() == list(range(33, 65))
    assert part.weights.dequantize(0, 1).tolist() == [[36.0] * 32]


def test_a_prescale_follows_the_order_of_channels() -> None:
    scheme = replace(
        INT8_SCHEME,
        weight=WeightSpec(elements.uint(8, 128), ScaleSpec("float32", "group", 32)),
        tensors=(
            *INT8_SCHEME.tensors[:1],
            StoredTensor("weight_scale", Role.SCALE, "float32", ("N", "G")),
            *INT8_SCHEME.tensors[2:],
            StoredTensor("g_idx", Role.GROUP_INDEX, "int32", ("K",)),
        ),
    )
    index = torch.randint(3, (K,), generator=torch.Generator().manual_seed(1))
    standard = StandardWeights(torch.zeros(N, K, dtype=torch.uint8), torch.ones(N, 3), None)
    tensors = from_standard_layout(
        scheme,
        standard,
        index,
        input_scale=torch.ones(1),
        input_zero=torch.zeros(1),
        prescale=torch.arange(1, K + 1).float(),
    )
    (part,) = refine([load_shard(ShardSource("layer", scheme, N, K, 0, N, 0, K), tensors)], CONTEXT)
    order, prescale = part.weights.permutation, part.weights.prescale
    assert order is not None
    assert prescale is not None
    assert bool((order < 0).any())
    assert torch.equal(prescale, torch.where(order < 0, 1, order + 1).float())


@pytest.mark.parametrize(
    "other",
    [
        static_shard(input_scale=torch.tensor(0.5)),
        static_shard(input_zero=torch.tensor(0)),
        static_shard(prescale=torch.ones(K)),
        static_shard(prescale=None),
        static_shard(replace(INT8_SCHEME, activation=None)),
        static_shard(replace(INT8_SCHEME, activation=ActivationSpec(INT8, True, "token"))),
        static_shard(replace(INT8_SCHEME, transform=TransformSpec("hadamard", "input", 32))),
    ],
    ids=["scale", "zero", "prescale", "no prescale", "none", "dynamic", "transform"],
)
def test_shards_that_want_other_inputs_stay_apart(other: LoadedShard) -> None:
    parts = refine([static_shard(), other, other], CONTEXT)
    assert [[shard.source.n for shard in part.weights.shards] for part in parts] == [[N], [N, N]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_zero": None}, ("input_zero", "checkpoint")),
        ({"input_scale": torch.tensor(0.0)}, ("layer.input_scale", "0.0", "finite")),
        ({"input_scale": torch.tensor(float("inf"))}, ("layer.input_scale", 1, 1)),
        ({"input_zero": torch.tensor(200)}, ("layer.input_zero_point", "200.0")),
        ({"prescale": torch.full((K,), float("inf"))}, ("layer.pre_quant_scale", 96, 96)),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(
    changes: dict[str, Any], message: tuple[object, ...]
) -> None:
    with pytest.raises(CheckpointError, match=saying(*message)):
        refine([static_shard(**changes)], CONTEXT)


def test_damaged_scales_are_refused() -> None:
    for name, tensor, value, message in (
        ("mxfp8", "weight_scale", 255, ("layer.weight_scale", 1, 120, "finite")),
        ("nvfp4", "weight_global_scale", 0.0, ("layer.weight_global_scale", 40, 40)),
    ):
        kind = KINDS[name]
        tensors, _ = stored(kind)
        tensors[tensor].view(-1)[-1] = value
        source = ShardSource("layer", kind.scheme, N, K, 0, N, 0, K)
        with pytest.raises(CheckpointError, match=saying(*message)):
            refine([load_shard(source, tensors)], CONTEXT)


def test_e4m3_scales_may_be_zero_over_any_codes() -> None:
    kind = KINDS["nvfp4"]
    tensors, exact = stored(kind)
    tensors["weight_scale"][3] = 0
    source = ShardSource("layer", kind.scheme, N, K, 0, N, 0, K)
    (part,) = refine([load_shard(source, tensors)], CONTEXT)
    exact[3] = 0
    assert torch.equal(part.weights.dequantize(0, N).double(), exact)


def test_blocks_whose_rows_differ_cannot_be_stored() -> None:
    kind = KINDS["block"]
    held = values(kind)
    assert held.standard.scale is not None
    held.standard.scale[5] *= 2
    with pytest.raises(ValueError, match=saying("weight_scale", "('B', 'G')")):
        from_standard_layout(kind.scheme, held.standard)
