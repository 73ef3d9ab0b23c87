# SPDX-License-Identifier: Apache-2.0
"""How tensors of a checkpoint arrive in a layer: shards, ranks, fused tensors, vLLM's reload."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.support.messages import saying
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parameter import (
    CheckpointParameter,
    collect_shards,
    create_parameters,
)
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.formats.awq import awq_gemm_scheme, awq_gemv_scheme
from vllm.compressed_linear.formats.compressed_tensors_schemes import pack_quantized_scheme
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.spec.scheme import CheckpointScheme, StandardWeights, dense_scheme

K = 128
CONTEXT = LayerContext("bfloat16", "bfloat16")

GPTQ = gptq_scheme(4, 32, version="gptq")
GPTQ3 = gptq_scheme(3, 64, version="gptq_v2")
GPTQ_BYTES = gptq_scheme(8, 32, version="gptq", container="int8")
AWQ = awq_gemm_scheme(32)
GEMV = awq_gemv_scheme(128)
PACKED = pack_quantized_scheme(4, 32, symmetric=False, group_index=False)
PACKED3 = pack_quantized_scheme(3, 32, symmetric=False, group_index=False)
DENSE = dense_scheme(torch.bfloat16)


@dataclass
class Disk:
    """One logical weight as a file holds it, and what it means: fp32 [N, K]."""

    name: str
    scheme: CheckpointScheme
    standard: StandardWeights
    index: torch.Tensor | None = None

    @property
    def n(self) -> int:
        return self.standard.codes.shape[0]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return from_standard_layout(self.scheme, self.standard, self.index)

    @property
    def meaning(self) -> torch.Tensor:
        weight, parts = self.scheme.weight, self.standard
        values = weight.element.decode(parts.codes)
        if parts.scale is None:
            return values
        index = self.index
        if index is None:
            index = torch.arange(K) // weight.group_size(K)
        if parts.zero is not None:
            values = values - parts.zero[:, index].to(torch.float32)
        return values * parts.scale[:, index].to(torch.float32)

    def source(self, part: slice | None = None, channels: slice | None = None) -> ShardSource:
        part, channels = part or slice(0, self.n), channels or slice(0, K)
        return ShardSource(
            self.name,
            self.scheme,
            self.n,
            K,
            part.start,
            part.stop - part.start,
            channels.start,
            channels.stop - channels.start,
        )


def disk(name: str, scheme: CheckpointScheme, n: int, *, act_order: bool = False) -> Disk:
    """A random weight of ``n`` output channels; the same for the same name."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + n)
    weight = scheme.weight
    if weight.scale is None:
        codes = torch.randn(n, K, generator=generator).to(weight.element.dense_dtype)
        return Disk(name, scheme, StandardWeights(codes, None, None))
    groups, top = weight.groups(K), 1 << weight.element.bits
    scale = (torch.rand(n, groups, generator=generator) + 0.5).to(torch.float16)
    zero = torch.randint(top, (n, groups), generator=generator, dtype=torch.uint8)
    codes = torch.randint(top, (n, K), generator=generator, dtype=torch.uint8)
    index = torch.arange(K) // weight.group_size(K)
    index = index[torch.randperm(K, generator=generator)] if act_order else index
    return Disk(name, scheme, StandardWeights(codes, scale, zero), index if act_order else None)


def load(parameters: Mapping[str, CheckpointParameter], weight: Disk, shard_id: Any = None) -> None:
    for name, tensor in weight.tensors.items():
        parameters[name].weight_loader(parameters[name], tensor, shard_id)


def loaded(
    sources: Sequence[ShardSource], weights: Sequence[Disk], ids: Sequence[Any]
) -> list[LoadedShard]:
    parameters = create_parameters(sources, "layer")
    for weight, shard_id in zip(weights, ids, strict=True):
        load(parameters, weight, shard_id)
    return collect_shards(parameters, sources)


def meaning(shard: LoadedShard) -> torch.Tensor:
    return shard.dequantize(0, shard.source.n)


def same(shard: LoadedShard, expected: torch.Tensor) -> None:
    torch.testing.assert_close(meaning(shard), expected, rtol=0, atol=0)


MIXED = (
    (GPTQ, GPTQ, GPTQ),
    (GPTQ, gptq_scheme(8, 64, version="gptq"), GPTQ3),
    (GPTQ, DENSE, gptq_scheme(2, -1, version="gptq_p")),
    (GPTQ_BYTES, GPTQ, GPTQ_BYTES),  # different containers under one name
    (AWQ, AWQ, DENSE),
    (PACKED, DENSE, PACKED3),
    (GEMV, GPTQ, DENSE),
)


@pytest.mark.parametrize("schemes", MIXED, ids=lambda schemes: " | ".join(map(str, schemes)))
@pytest.mark.parametrize("ids", [("q", "k", "v"), (0, 1, 2)])
def test_shards_of_one_layer_may_have_different_schemes(
    schemes: Sequence[CheckpointScheme], ids: Sequence[Any]
) -> None:
    weights = [
        disk(name, scheme, n, act_order=name == "k" and scheme is GPTQ)
        for name, scheme, n in zip("qkv", schemes, (64, 32, 32), strict=True)
    ]
    for shard, weight in zip(
        loaded([w.source() for w in weights], weights, ids), weights, strict=True
    ):
        same(shard, weight.meaning)
        assert shard.source == weight.source()


@pytest.mark.parametrize("schemes", MIXED, ids=lambda schemes: " | ".join(map(str, schemes)))
@pytest.mark.parametrize("rank", range(4))
def test_four_ranks_with_two_kv_heads(schemes: Sequence[CheckpointScheme], rank: int) -> None:
    """q is divided by four, k and v by two: ranks 0 and 1 hold the same kv head."""
    weights = [disk(n, s, 64) for n, s in zip("qkv", schemes, strict=True)]
    parts = [slice(rank * 16, rank * 16 + 16), *[slice(rank // 2 * 32, rank // 2 * 32 + 32)] * 2]
    sources = [weight.source(part) for weight, part in zip(weights, parts, strict=True)]
    shards = loaded(sources, weights, "qkv")
    for shard, weight, part in zip(shards, weights, parts, strict=True):
        same(shard, weight.meaning[part])


@pytest.mark.parametrize("scheme", [GPTQ, GPTQ3, AWQ, PACKED, PACKED3, DENSE, GPTQ_BYTES])
@pytest.mark.parametrize("channels", [slice(0, 48), slice(48, 128), slice(32, 96), slice(80, 88)])
def test_channels_cut_inside_groups_and_words(scheme: CheckpointScheme, channels: slice) -> None:
    weight = disk("o", scheme, 32)
    source = weight.source(channels=channels)
    (shard,) = loaded([source], [weight], [None])
    same(shard, weight.meaning[:, channels])
    if scheme.weight.scale is not None:
        (part,) = refine([shard], CONTEXT)
        assert part.descriptor.in_features == channels.stop - channels.start


@pytest.mark.parametrize("channels", [slice(0, 48), slice(48, 128)])
def test_channels_of_an_act_ordered_weight(channels: slice) -> None:
    weight = disk("o", GPTQ, 32, act_order=True)
    (shard,) = loaded([weight.source(channels=channels)], [weight], [None])
    same(shard, weight.meaning[:, channels])


def fused(name: str, scheme: CheckpointScheme, widths: Sequence[int]) -> tuple[Disk, list[Disk]]:
    """One weight on disk, and the logical ones it consists of."""
    whole = disk(name, scheme, sum(widths))
    parts, begin = [], 0
    for width in widths:
        rows = slice(begin, begin + width)
        standard = StandardWeights(
            whole.standard.codes[rows],
            None if whole.standard.scale is None else whole.standard.scale[rows],
            None if whole.standard.zero is None else whole.standard.zero[rows],
        )
        parts.append(Disk(name, scheme, standard))
        begin += width
    return whole, parts


FUSABLE = [GPTQ, GPTQ3, AWQ, PACKED, PACKED3, DENSE, GEMV]


@pytest.mark.parametrize("scheme", FUSABLE, ids=str)
@pytest.mark.parametrize("widths", [(64, 32, 32), (40, 36, 20), (17, 3, 76)])
def test_fused_on_disk(scheme: CheckpointScheme, widths: Sequence[int]) -> None:
    """Zero points packed along N: a shard may begin inside a word."""
    whole, parts = fused("qkv", scheme, widths)
    shards = loaded([part.source() for part in parts], [whole], [None])
    for shard, part in zip(shards, parts, strict=True):
        same(shard, part.meaning)


@pytest.mark.parametrize("scheme", FUSABLE, ids=str)
@pytest.mark.parametrize("rank", [0, 1])
def test_fused_on_disk_and_divided_among_ranks(scheme: CheckpointScheme, rank: int) -> None:
    whole, parts = fused("qkv", scheme, (40, 36, 20))
    halves = [slice(rank * p.n // 2, (rank + 1) * p.n // 2) for p in parts]
    sources = [part.source(half) for part, half in zip(parts, halves, strict=True)]
    for shard, part, half in zip(loaded(sources, [whole], [None]), parts, halves, strict=True):
        same(shard, part.meaning[half])


@pytest.mark.parametrize("scheme", FUSABLE, ids=str)
def test_some_shards_fused_on_disk(scheme: CheckpointScheme) -> None:
    whole, parts = fused("kv", scheme, (36, 28))
    alone = disk("q", scheme, 40)
    everything = [alone, *parts]
    sources = [part.source() for part in everything]
    for shard, part in zip(loaded(sources, [alone, whole], [0, (1, 2)]), everything, strict=True):
        same(shard, part.meaning)


def test_a_weight_that_is_fused_in_parts_only_is_refused() -> None:
    whole, parts = fused("qkv", AWQ, (40, 36))
    sources = [part.source() for part in parts]
    parameters = create_parameters(sources, "layer")
    load(parameters, whole)
    scales = parameters["scales"]
    scales.weight_loader(scales, parts[0].tensors["scales"], 0)
    with pytest.raises(CheckpointError, match=saying("layer", "qkv.scales")):
        collect_shards(parameters, sources)


def test_loading_again_overwrites() -> None:
    first, second = disk("q", PACKED3, 32), disk("p", PACKED3, 32)
    parameters = create_parameters([first.source()], "layer")
    load(parameters, first)
    load(parameters, second)
    (shard,) = collect_shards(parameters, [first.source()])
    same(shard, second.meaning)
    # Nothing of a load that was consumed counts for the next one.
    with pytest.raises(CheckpointError, match=saying("weight_packed", "checkpoint")):
        collect_shards(parameters, [first.source()])


def test_scales_keep_the_dtype_of_the_file() -> None:
    weight = disk("q", GPTQ, 32)
    parts = weight.standard
    assert parts.scale is not None
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        scale = parts.scale.to(dtype)
        changed = Disk("q", GPTQ, StandardWeights(parts.codes, scale, parts.zero))
        (shard,) = loaded([changed.source()], [changed], [None])
        assert shard.scale() is not None
        assert torch.equal(shard.scale(), scale)  # type: ignore[arg-type]


def test_scales_of_64_bits_are_refused_since_32_do_not_hold_them() -> None:
    weight = disk("q", GPTQ, 32)
    parts = weight.standard
    assert parts.scale is not None
    wide = Disk("q", GPTQ, StandardWeights(parts.codes, parts.scale.double(), parts.zero))
    expected = saying("q.scales", "float64", "a dtype that float32 holds")
    with pytest.raises(CheckpointError, match=expected):
        loaded([wide.source()], [wide], [None])


def test_padding_rows_follow_the_real_ones() -> None:
    weight = disk("lm_head", AWQ, 40)
    source = ShardSource("lm_head", AWQ, 40, K, 16, 24, 0, K, padding=8)
    (shard,) = loaded([source], [weight], [None])
    (part,) = refine([shard], CONTEXT)
    assert part.descriptor.out_features == 32
    values = part.weights.dequantize(0, 32)
    torch.testing.assert_close(values[:24], weight.meaning[16:], rtol=0, atol=0)
    assert not bool(values[24:].any())


# What is refused.


def test_a_tensor_that_no_scheme_of_the_shard_has() -> None:
    weights = [disk("q", GPTQ, 32), disk("k", DENSE, 32)]
    parameters = create_parameters([w.source() for w in weights], "qkv_proj")
    qweight = parameters["qweight"]
    with pytest.raises(CheckpointError, match=saying("qkv_proj", "qweight", "shard k", "q")):
        qweight.weight_loader(qweight, weights[0].tensors["qweight"], "k")


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_a_tensor_that_never_arrived(name: str) -> None:
    weights = [disk("q", GPTQ, 32), disk("k", AWQ, 32)]
    sources = [w.source() for w in weights]
    parameters = create_parameters(sources, "qkv_proj")
    load(parameters, weights[0], "q")
    for other, tensor in weights[1].tensors.items():
        if other != name:
            parameters[other].weight_loader(parameters[other], tensor, "k")
    with pytest.raises(CheckpointError, match=saying("qkv_proj", f"k.{name}", "checkpoint")):
        collect_shards(parameters, sources)


def test_dummy_weights_need_no_tensors() -> None:
    source = disk("q", GPTQ, 32).source()
    parameters = create_parameters([source], "layer")
    (shard,) = collect_shards(parameters, [source], dummy=[{"scales": "float16"}])
    assert meaning(shard).shape == (32, K)
    assert shard.tensors["scales"].dtype is torch.float16


# vLLM's reload: parameters on meta devices, replayed loads, elements counted.


@pytest.mark.needs_vllm
def test_loads_on_a_meta_copy_are_counted_and_replayed() -> None:
    from vllm.model_executor.model_loader.reload.meta import (
        get_numel_loaded,
        materialize_meta_tensor,
        to_meta_tensor,
    )

    weights = [disk("q", GPTQ, 64), disk("k", GPTQ3, 32), disk("v", DENSE, 32)]
    sources = [w.source() for w in weights]
    built = create_parameters(sources, "layer")
    metas = {name: to_meta_tensor(parameter) for name, parameter in built.items()}
    calls = []
    for weight, shard_id in zip(weights, "qkv", strict=True):
        for name, tensor in weight.tensors.items():
            parameter = metas[name]
            assert isinstance(parameter, CheckpointParameter)
            signature = inspect.signature(parameter.weight_loader)
            bound = signature.bind(parameter, tensor, shard_id)
            bound.apply_defaults()
            count, _ = get_numel_loaded(parameter.weight_loader, bound)
            assert count == tensor.numel()
            calls.append((name, bound))
    total = sum(metas[name].numel() for name in metas)
    # Never more than the parameters hold, or vLLM would process the layer too early.
    assert sum(bound.arguments["loaded_weight"].numel() for _, bound in calls) <= total

    real = {name: materialize_meta_tensor(meta) for name, meta in metas.items()}
    for name, bound in calls:
        bound.arguments["param"] = real[name]
        real[name].weight_loader(*bound.args, **bound.kwargs)
    for shard, weight in zip(collect_shards(real, sources), weights, strict=True):
        same(shard, weight.meaning)


def test_one_dtype_lets_vllm_count_the_whole_parameter() -> None:
    """A layer whose shards are alike is processed as soon as its last tensor is there."""
    weights = [disk(name, AWQ, 64) for name in "qk"]
    parameters = create_parameters([w.source() for w in weights], "layer")
    for name, parameter in parameters.items():
        assert parameter.numel() == sum(weight.tensors[name].numel() for weight in weights)
        assert parameter.dtype == (torch.float32 if name == "scales" else torch.int32)


def test_parameters_hold_no_reference_to_a_layer() -> None:
    parameter = create_parameters([disk("q", GPTQ, 32).source()], "layer")["qweight"]
    assert "weight_loader" in parameter.__dict__  # vLLM's reload wraps this very attribute
    assert not inspect.ismethod(parameter.weight_loader)
    assert not any(isinstance(v, torch.nn.Module) for v in parameter.__dict__.values())
