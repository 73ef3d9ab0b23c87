# SPDX-License-Identifier: Apache-2.0
"""Zero points against a configuration that says symmetric, and group indices that have no order.

Words of zero points are packed bit by bit here, and weights are calculated from the codes, so
nothing of the package decides what is right.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.bit_streams import words
from tests.support.checkpoints import (
    assert_matches_reference,
    checkpoint_reference,
    checkpoint_tensors,
)
from tests.support.described import Described
from tests.support.messages import saying, says
from tests.support.shards import linears, load, read_config, source_of
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parameter import collect_shards, create_parameters
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.spec.packing import Packing, pack
from vllm.compressed_linear.spec.scheme import CheckpointScheme

CONTEXT = LayerContext("bfloat16", "bfloat16")
N, K, GROUP = 64, 128, 32
G = K // GROUP
NAME = "model.layers.0.q_proj"
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}

Tensors = dict[str, torch.Tensor]

GPTQ_FILES = [
    *((version, bits) for version in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8)),
    *(("gptq_p", bits) for bits in range(2, 9)),
]


def config(version: str, bits: int, **other: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "bits": bits,
        "group_size": GROUP,
        "sym": True,
        **other,
    }


def gptq_file(
    version: str, bits: int, stored: torch.Tensor | None, seed: int = 0
) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """Tensors whose zero-point fields are ``stored`` [G, N], the codes [N, K] and scales [N, G]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (N, K), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(N, G, generator=generator) + 0.1).half()
    planes = PLANES.get(bits, ()) if version == "gptq_p" else ()
    tensors = {
        f"{NAME}.qweight": pack(codes.t(), Packing(bits, planes=planes), 0),
        f"{NAME}.scales": scale.t().contiguous(),
    }
    if stored is not None:
        tensors[f"{NAME}.qzeros"] = words(stored, bits, planes)
    return tensors, codes, scale


def weight(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int, index: Any = None
) -> torch.Tensor:
    """fp32 [N, K] for zero points [N, G] or one for all."""
    index = torch.arange(K) // GROUP if index is None else index
    points = zero.float()[:, index] if isinstance(zero, torch.Tensor) else zero
    return (codes.float() - points) * scale.float()[:, index]


def scheme_of(settings: dict[str, Any], tensors: Tensors | None = None) -> CheckpointScheme:
    found = Described.of(settings)
    if tensors is not None:
        found = found.with_file(list(tensors))
    scheme = found.resolve(NAME)
    assert isinstance(scheme, CheckpointScheme)
    return scheme


CUTS = [
    {},
    *({"k_start": start, "k": K // 2} for start in (0, K // 2)),
    *({"n_start": start, "n": N // 2} for start in (0, N // 2)),
]
"""The whole, and the parts of two ranks that divide the input or the output channels."""


def refined(scheme: CheckpointScheme, tensors: Tensors, cut: dict[str, int]) -> LoadedShard:
    return load(source_of(NAME, scheme, N, K, cut), tensors)


def part_of(whole: torch.Tensor, cut: dict[str, int]) -> torch.Tensor:
    n, k = cut.get("n_start", 0), cut.get("k_start", 0)
    return whole[n : n + cut.get("n", N), k : k + cut.get("k", K)]


def assert_symmetric(
    scheme: CheckpointScheme, tensors: Tensors, expected: torch.Tensor, bits: int
) -> set[str]:
    """On every rank; the notes for the plan."""
    notes = set()
    for cut in CUTS:
        shard = refined(scheme, tensors, cut)
        assert torch.equal(shard.dequantize(0, shard.source.n), part_of(expected, cut))
        (part,) = refine([shard], CONTEXT)
        assert part.descriptor.weight.zero is None
        assert part.descriptor.weight.element == uint(bits, 1 << (bits - 1))
        rows = part.weights.rows(0, part.weights.n)
        assert rows.zero is None
        assert rows.scale is not None
        assert torch.equal(part.weights.dequantize(0, part.weights.n), part_of(expected, cut))
        notes |= set(part.notes)
    return notes


@pytest.mark.parametrize(("version", "bits"), GPTQ_FILES)
def test_one_value_of_any_tool_means_symmetric(version: str, bits: int) -> None:
    middle = 1 << (bits - 1)
    own = middle - (version == "gptq")
    for value in {middle, middle - 1, 0}:
        stored = torch.full((G, N), value)
        tensors, codes, scale = gptq_file(version, bits, stored)
        scheme = scheme_of(config(version, bits))
        notes = assert_symmetric(scheme, tensors, weight(codes, scale, middle), bits)
        if value == own:
            assert notes == set()
        else:
            (note,) = notes
            assert says(note, "sym: true", value, own)
        # What the configuration does not say is read as it is stored.
        for silent in ({"sym": None}, {"sym": False}):
            literal = refined(scheme_of(config(version, bits, **silent)), tensors, {})
            point = (value + (version == "gptq")) % (1 << bits)
            assert torch.equal(literal.dequantize(0, N), weight(codes, scale, point))


@pytest.mark.parametrize(
    ("version", "bits", "word"),
    [
        ("gptq", 4, 0x88888888),
        ("gptq_v2", 4, 0x77777777),
        ("gptq", 8, 0x80808080),
        ("gptq", 2, 0xAAAAAAAA),
        ("gptq_v2", 8, 0x7F7F7F7F),
        ("gptq_v2", 2, 0x55555555),
    ],
)
def test_words_of_the_other_version(version: str, bits: int, word: int) -> None:
    tensors, codes, scale = gptq_file(version, bits, None)
    filled = torch.full((G, N * bits // 32), word, dtype=torch.int64).to(torch.int32)
    tensors[f"{NAME}.qzeros"] = filled
    scheme = scheme_of(config(version, bits))
    assert assert_symmetric(scheme, tensors, weight(codes, scale, 1 << (bits - 1)), bits)


@pytest.mark.parametrize(("version", "bits"), GPTQ_FILES)
@pytest.mark.parametrize("empty", [None, (0,), (G, 0), (0, N)])
def test_symmetric_files_without_zero_points(
    version: str, bits: int, empty: tuple[int, ...] | None
) -> None:
    tensors, codes, scale = gptq_file(version, bits, None)
    if empty is not None:
        tensors[f"{NAME}.qzeros"] = torch.empty(empty, dtype=torch.int32)
        tensors[f"{NAME}.g_idx"] = torch.empty(0, dtype=torch.int32)
    scheme = scheme_of(config(version, bits), tensors)
    notes = assert_symmetric(scheme, tensors, weight(codes, scale, 1 << (bits - 1)), bits)
    assert notes == set()


def test_without_the_setting_zero_points_are_needed() -> None:
    tensors, _, _ = gptq_file("gptq", 4, None)
    with pytest.raises(CheckpointError, match=saying(f"{NAME}.qzeros", "not in the checkpoint")):
        refined(scheme_of(config("gptq", 4, sym=None)), tensors, {})


ASYMMETRIC = [
    "gptqmodel-gptq-w2-g64-asym",
    "gptqmodel-gptq-w3-g128-asym",
    "gptqmodel-gptq-w4-g32-asym-descact",
    "gptqmodel-gptq-w8-g64-asym-descact",
    "gptqmodel-gptqv2-w4-g64-asym",
    "autoround-native-w2-g32-asym",
    "autoawq-awq-gemm-g128-asym",
    "autoawq-awq-gemv-g64-asym",
    "autoawq-awq-gemvfast-g128-asym",
]


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_zero_points_that_vary_are_used_whatever_the_configuration_says(name: str) -> None:
    """Files of the quantizers, and what their own libraries read out of them."""
    found, tensors, reference = read_config(name), checkpoint_tensors(name), None
    reference = checkpoint_reference(name)
    said = {**found.format.config, "sym": True, "zero_point": False}
    wrong = replace(found, format=Described.of(said).format)
    for linear in linears(name)[:7]:
        scheme = wrong.resolve(linear)
        assert isinstance(scheme, CheckpointScheme)
        assert scheme.symmetric
        n, k = len(reference[f"{linear}.rowsum"]), len(reference[f"{linear}.colsum"])
        shard = load(source_of(linear, scheme, n, k), tensors)
        assert_matches_reference(shard.dequantize(0, n), reference, linear)
        (part,) = refine([shard], CONTEXT)
        assert part.descriptor.weight.zero is not None


@pytest.mark.parametrize(
    ("version", "stored", "complaint"),
    [
        ("gptq", torch.full((G, N), 3), (3, "sym: true", 7)),
        ("gptq_v2", torch.full((G, N), 15), (15, "sym: true", 8)),
        # The marks of two versions.
        ("gptq", (torch.arange(G * N) % 2 + 7).view(G, N), ("7 to 8", "8.50", "sym: true")),
        ("gptq_v2", (torch.arange(G * N) % 2 * 8).view(G, N), ("0 to 8", "4.00", "sym: true")),
        # Zero points of an asymmetric quantizer, one less or more than the version would have.
        ("gptq", (torch.arange(G * N) % 4 + 6).view(G, N), ("6 to 9", "8.50", "sym: true")),
        ("gptq_v2", (torch.arange(G * N) % 4 + 5).view(G, N), ("5 to 8", "6.50", "sym: true")),
        # Marked as the other version would have it, but not throughout.
        ("gptq", torch.full((G, N), 8).index_fill(0, torch.tensor(1), 9), ("8 to 9", "sym: true")),
    ],
)
def test_zero_points_that_do_not_fit_the_stated_version_are_an_error(
    version: str, stored: torch.Tensor, complaint: tuple[object, ...]
) -> None:
    tensors, _, _ = gptq_file(version, 4, stored)
    scheme = scheme_of(config(version, 4))
    for cut in CUTS:
        with pytest.raises(CheckpointError, match=saying(f"{NAME}.qzeros", *complaint)):
            refine([refined(scheme, tensors, cut)], CONTEXT)
    refine([refined(scheme_of(config(version, 4, sym=False)), tensors, {})], CONTEXT)


def test_ranks_agree_although_the_part_of_one_looks_symmetric() -> None:
    """Rank 0 of two has the other version's middle throughout, and so do its groups."""
    stored = (torch.arange(G * N) % 3 + 5).view(G, N)
    stored[:, : N // 2] = 8
    stored[: G // 2] = 8
    stored[G // 2 :, N // 2 :] = 2
    stored[0, -1] = 12
    tensors, codes, scale = gptq_file("gptq", 4, stored)
    expected = weight(codes, scale, (stored + 1).t())
    scheme = scheme_of(config("gptq", 4))
    for cut in CUTS:
        shard = refined(scheme, tensors, cut)
        assert torch.equal(shard.dequantize(0, shard.source.n), part_of(expected, cut))
        (part,) = refine([shard], CONTEXT)
        assert part.notes == refine([refined(scheme, tensors, {})], CONTEXT)[0].notes
        assert part.notes[0].startswith("zero points are stored as 2 to 12 and used")


@pytest.mark.parametrize("fused", [False, True])
def test_every_member_of_a_fused_layer_is_read_by_itself(fused: bool) -> None:
    """Of each version one, and one that is as it should be; fused on disk, words hold two."""
    widths, values = (20, 12, 32), (8, 7, 0)
    stored = torch.cat([torch.full((G, n), v) for n, v in zip(widths, values, strict=True)], 1)
    tensors, codes, scale = gptq_file("gptq", 4, stored)
    expected = weight(codes, scale, 8).split(widths)
    scheme = scheme_of(config("gptq", 4))
    if not fused:
        widths = (16, 16, 32)
        stored = torch.cat([torch.full((G, n), v) for n, v in zip(widths, values, strict=True)], 1)
        tensors, codes, scale = gptq_file("gptq", 4, stored)
        expected = weight(codes, scale, 8).split(widths)
    sources = [
        replace(source_of(f"a.{name}_proj", scheme, n, K), n_start=0)
        for name, n in zip("qkv", widths, strict=True)
    ]
    parameters = create_parameters(sources, "a.qkv_proj")
    for last in ("qweight", "qzeros", "scales"):
        tensor, parameter = tensors[f"{NAME}.{last}"], parameters[last]
        if fused:
            parameter.weight_loader(parameter, tensor)
            continue
        per = tensor.shape[1] // 4
        for shard, piece in zip("qkv", tensor.split([per, per, 2 * per], 1), strict=True):
            parameter.weight_loader(parameter, piece, shard)
    shards = collect_shards(parameters, sources)
    for shard, one in zip(shards, expected, strict=True):
        assert torch.equal(shard.dequantize(0, len(one)), one)
    (part,) = refine(shards, CONTEXT)
    assert part.descriptor.weight.zero is None
    assert [note.partition(":")[0] for note in part.notes] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("value", [0, 7, 8])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_awq_without_zero_points_by_its_configuration(value: int, version: str) -> None:
    """All fields are equal, so their order in a word does not matter."""
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": version}
    scheme = scheme_of({**settings, "zero_point": False})
    codes = torch.randint(16, (N, K), dtype=torch.uint8)
    scale = (torch.rand(N, G) + 0.1).half()
    filled = torch.full((G, N // 8), value * 0x11111111, dtype=torch.int64).to(torch.int32)
    stored = next(t for t in scheme.tensors if t.name == "qweight")
    tensors: Tensors = {f"{NAME}.scales": scale.t().contiguous(), f"{NAME}.qzeros": filled}
    if version == "gemv":
        # Eight groups to a word and four words to a row at this group size, the rest of them 0.
        padded = torch.nn.functional.pad(scale, (0, 32 - G))
        row = torch.zeros(N, 4, dtype=torch.int64)
        row[:, 0] = value * 0x1111
        tensors = {f"{NAME}.scales": padded, f"{NAME}.qzeros": row.to(torch.int32)}
    assert stored.packing is not None
    if version == "gemm":
        tensors[f"{NAME}.qweight"] = pack(codes.t().contiguous(), stored.packing, 1)
    else:
        tensors[f"{NAME}.qweight"] = pack(codes, stored.packing, 1)
    expected = weight(codes, scale, 8)
    assert_symmetric(scheme, tensors, expected, 4)
    tensors.pop(f"{NAME}.qzeros")
    assert_symmetric(scheme, tensors, expected, 4)


@pytest.mark.parametrize("stored", ["nothing", "zeros", "scaled"])
def test_awq_gemv_fast_without_zero_points_by_its_configuration(stored: str) -> None:
    name, linear = "autoawq-awq-gemvfast-g128-asym", "model.layers.0.mlp.down_proj"
    found, tensors = read_config(name), checkpoint_tensors(name)
    n, k = 256, 512
    asymmetric = found.resolve(linear)
    assert isinstance(asymmetric, CheckpointScheme)
    shard = load(source_of(linear, asymmetric, n, k), tensors)
    codes, scale = shard.codes(0, n), shard.scale()
    assert scale is not None
    points = tensors[f"{linear}.qzeros"]
    scales = tensors[f"{linear}.scales"]
    if stored == "nothing":
        tensors.pop(f"{linear}.qzeros")
    else:
        tensors[f"{linear}.qzeros"] = scales * -8 if stored == "scaled" else points * 0
    wrong = Described.of({**found.format.config, "zero_point": False}, found.file.headers)
    scheme = wrong.resolve(linear)
    assert isinstance(scheme, CheckpointScheme)
    (part,) = refine([load(source_of(linear, scheme, n, k), tensors)], CONTEXT)
    assert part.descriptor.weight.zero is None
    expected = (codes.float() - 8) * scale.float().repeat_interleave(k // scale.shape[1], 1)
    torch.testing.assert_close(part.weights.dequantize(0, n), expected, rtol=2e-7, atol=0)


# Group indices.


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("value", [0, -1])
def test_a_group_index_of_one_value_has_no_order(desc_act: bool, value: int) -> None:
    zero = torch.randint(16, (N, G))
    tensors, codes, scale = gptq_file("gptq_v2", 4, zero.t())
    tensors[f"{NAME}.g_idx"] = torch.full((K,), value, dtype=torch.int32)
    scheme = scheme_of(config("gptq_v2", 4, sym=False, desc_act=desc_act))
    expected = weight(codes, scale, zero)
    for cut in CUTS:
        shard = refined(scheme, tensors, cut)
        assert torch.equal(shard.dequantize(0, shard.source.n), part_of(expected, cut))
        (part,) = refine([shard], CONTEXT)
        assert part.descriptor.channel_order is None
        assert torch.equal(part.weights.dequantize(0, part.weights.n), part_of(expected, cut))


def test_a_slice_of_zeros_of_a_group_index_with_an_order() -> None:
    """Rank 1 of four has the channels of group 0, which are not its own by position."""
    index = (torch.arange(K) // GROUP).roll(GROUP)
    zero = torch.randint(16, (N, G))
    tensors, codes, scale = gptq_file("gptq_v2", 4, zero.t())
    tensors[f"{NAME}.g_idx"] = index.to(torch.int32)
    scheme = scheme_of(config("gptq_v2", 4, sym=False, desc_act=True))
    expected = weight(codes, scale, zero, index)
    for rank in range(4):
        cut = {"k_start": rank * 32, "k": 32}
        shard = refined(scheme, tensors, cut)
        assert torch.equal(shard.dequantize(0, N), part_of(expected, cut))
        (part,) = refine([shard], CONTEXT)
        assert torch.equal(part.weights.dequantize(0, N), part_of(expected, cut))


def test_one_group_needs_no_order() -> None:
    tensors, codes, scale = gptq_file("gptq", 4, torch.full((G, N), 7))
    scale = scale[:, :1]
    tensors[f"{NAME}.scales"] = scale.t().contiguous()
    tensors[f"{NAME}.qzeros"] = tensors[f"{NAME}.qzeros"][:1]
    tensors[f"{NAME}.g_idx"] = torch.zeros(K, dtype=torch.int32)
    scheme = scheme_of(config("gptq", 4, group_size=-1))
    expected = (codes.float() - 8) * scale.float()
    assert_symmetric(scheme, tensors, expected, 4)
