# SPDX-License-Identifier: Apache-2.0
"""Packings against an independent reading of the same bits, other libraries, and real files."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.checkpoints import (
    assert_matches_reference,
    checkpoint_reference,
    checkpoint_tensors,
)
from tests.support.messages import saying
from tests.support.strategies import AWQ_ORDER, CONTAINERS, PLANES, packings
from vllm.compressed_linear.spec.packing import Packing, ZeroBump, pack, unpack
from vllm.compressed_linear.spec.scheme import Role, StoredTensor, slice_axis


def stream(fields: list[int], width: int) -> int:
    """Little-endian bit stream of ``width``-bit fields, as one big integer."""
    return sum(field << (width * place) for place, field in enumerate(fields))


def as_words(number: int, count: int, packing: Packing) -> list[int]:
    """``count`` containers of a big integer, lowest first, as the container's dtype holds them."""
    bits = CONTAINERS[packing.container]
    words = [(number >> (bits * place)) & ((1 << bits) - 1) for place in range(count)]
    if packing.container == "uint8":
        return words
    return [word - (1 << bits) if word >> (bits - 1) else word for word in words]


def slow_pack(codes: list[int], packing: Packing) -> list[int]:
    """What ``pack`` must give for one row, from the definition and with big integers only."""
    bits, width = packing.bits, CONTAINERS[packing.container]
    mask = (1 << bits) - 1
    if packing.zero_bump is ZeroBump.FIELD:
        codes = [(code - 1) % (1 << bits) for code in codes]
    if packing.signed:
        codes = [(code - (1 << (bits - 1))) & mask for code in codes]
    if packing.planes:
        number = 0
        blocks = -(-len(codes) // width)
        for block in range(blocks):
            part = codes[block * width : (block + 1) * width]
            below = 0
            for plane in packing.planes:
                fields = [(code >> below) & ((1 << plane) - 1) for code in part]
                number |= stream(fields, plane) << (width * (block * bits + below))
                below += plane
        return as_words(number, blocks * bits, packing)
    if packing.dense and not packing.order:
        number, count = stream(codes, bits), -(-len(codes) * bits // width)
    else:
        each = width // bits
        count, number = -(-len(codes) // each), 0
        for word in range(-(-len(codes) // each)):
            part = codes[word * each : (word + 1) * each]
            part += [0] * (each - len(part))
            if packing.order:
                part = [part[element] for element in packing.order]
            number |= stream(part, bits) << (width * word)
    if packing.zero_bump is ZeroBump.WORD:
        ones = stream([1] * (width // bits), bits)
        words = [(word - ones) % (1 << width) for word in as_words(number, count, packing)]
        number = stream(words, width)
    return as_words(number, count, packing)


@st.composite
def packed_codes(draw: st.DrawFn) -> tuple[Packing, list[int]]:
    packing = draw(packings())
    code = st.integers(0, (1 << packing.bits) - 1)
    return packing, draw(st.lists(code, min_size=0, max_size=150))


@given(packed_codes())
def test_pack_writes_the_bits_of_the_definition(case: tuple[Packing, list[int]]) -> None:
    packing, codes = case
    stored = pack(torch.tensor(codes, dtype=torch.uint8), packing)
    assert stored.dtype == getattr(torch, packing.container)
    assert stored.tolist() == slow_pack(codes, packing)
    assert len(stored) == packing.words(len(codes))


@given(packed_codes())
def test_unpack_reads_the_bits_of_the_definition(case: tuple[Packing, list[int]]) -> None:
    packing, codes = case
    stored = torch.tensor(slow_pack(codes, packing), dtype=getattr(torch, packing.container))
    assert unpack(stored, packing, len(codes)).tolist() == codes


EVERY_WIDTH = [
    (bits, container, kind)
    for bits in range(1, 9)
    for container, width in CONTAINERS.items()
    for kind in ("dense", "not dense", "planes", "signed", "field", "word")
    if not (kind == "planes" and bits not in PLANES)
    # A constant added to whole words only makes sense where no field straddles them.
    and not (kind == "word" and width % bits)
]


@pytest.mark.parametrize(("bits", "container", "kind"), EVERY_WIDTH)
def test_every_width_in_every_container(bits: int, container: str, kind: str) -> None:
    """All codes, in a matrix, along both dimensions: nothing left to chance."""
    packing = Packing(
        bits,
        container=container,
        dense=kind != "not dense",
        planes=PLANES[bits] if kind == "planes" else (),
        signed=kind == "signed",
        zero_bump=ZeroBump(kind) if kind in ("field", "word") else ZeroBump.NONE,
    )
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (3, 5, 131), generator=generator, dtype=torch.uint8)
    codes[0, 0, : 1 << bits] = torch.arange(1 << bits)[:131].to(torch.uint8)
    for dim in (-1, 0, 1):
        matrix = codes.movedim(-1, dim)
        stored = pack(matrix, packing, dim)
        assert stored.is_contiguous()
        assert stored.movedim(dim, -1)[2, 4].tolist() == slow_pack(codes[2, 4].tolist(), packing)
        assert torch.equal(unpack(stored, packing, 131, dim), matrix)


@given(packed_codes(), st.data())
def test_a_slice_holds_what_the_whole_holds(
    case: tuple[Packing, list[int]], data: st.DataObject
) -> None:
    packing, codes = case
    start = data.draw(st.integers(0, len(codes)))
    length = data.draw(st.integers(0, len(codes) - start))
    stored = pack(torch.tensor(codes, dtype=torch.uint8), packing)
    part = slice_axis(packing, "K", start, length)
    kept = stored.narrow(0, part.first, part.count)
    whole = unpack(kept, packing, part.skip + part.length)
    assert whole[part.skip :].tolist() == codes[start : start + length]
    # Outward to whole blocks only: what is kept may not grow with what lies before or behind.
    assert part.skip < packing.run
    assert part.count <= packing.words(length + packing.run)


def test_slices_of_axes_that_are_not_packed_are_themselves() -> None:
    for packing in (None, Packing(4, "K")):
        part = slice_axis(packing, "N", 5, 7)
        assert (part.first, part.count, part.skip, part.length) == (5, 7, 0, 7)


@pytest.mark.parametrize("bits", range(1, 9))
def test_not_dense_is_the_order_of_older_compressed_tensors(bits: int) -> None:
    """The installed library, version 0.17, packs without straddling."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(1 << bits, (6, 70), generator=torch.Generator().manual_seed(bits))
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    for dim in (1, 0):
        theirs = helpers.pack_to_int32(signed, bits, packed_dim=dim)
        packing = Packing(bits, dense=False)
        assert torch.equal(pack(codes.to(torch.uint8), packing, dim), theirs)
        assert torch.equal(unpack(theirs, packing, codes.shape[dim], dim), codes.to(torch.uint8))


def test_pack_factors_and_sizes_are_exact() -> None:
    assert Packing(3).pack_factor == Fraction(32, 3)
    assert Packing(3, dense=False).pack_factor == 10
    assert Packing(6, container="int64").pack_factor == Fraction(64, 6)
    assert Packing(5, planes=(4, 1)).pack_factor == Fraction(32, 5)
    # Widths at K = 4096 that tell both packings of compressed-tensors apart.
    assert [Packing(b).words(4096) for b in (3, 5, 6, 7)] == [384, 640, 768, 896]
    assert [Packing(b, dense=False).words(4096) for b in (3, 5, 6, 7)] == [410, 683, 820, 1024]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, (0,)),
        ({"bits": 9}, (9,)),
        ({"bits": 4, "container": "float32"}, ("float32",)),
        ({"bits": 3, "planes": (2, 2)}, (3,)),
        ({"bits": 4, "order": (0, 1, 2)}, ("permutation",)),
        ({"bits": 4, "order": (0, 0, 1, 2, 3, 4, 5, 6)}, ("permutation",)),
        ({"bits": 3, "order": tuple(range(32))}, ("permutation",)),
    ],
)
def test_impossible_packings_are_refused(
    arguments: dict[str, object], message: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=saying(*message)):
        Packing(**arguments)  # type: ignore[arg-type]


def test_unpack_refuses_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=saying("int64", "int32")):
        unpack(torch.zeros(4, dtype=torch.int64), Packing(4), 8)
    with pytest.raises(ValueError, match=saying(3, 25)):
        unpack(torch.zeros(3, dtype=torch.int32), Packing(4), 25)


def test_shapes_tell_packings_apart() -> None:
    dense, loose = Packing(3), Packing(3, dense=False)
    stored = StoredTensor("weight_packed", Role.CODES, "int32", ("N", "K"), dense, (loose,))
    extents = {"N": 8, "K": 4096, "G": 32}
    assert stored.packing_of((8, 384), extents) == dense
    assert stored.packing_of((8, 410), extents) == loose
    with pytest.raises(ValueError, match=saying([8, 400], [8, 384], [8, 410])):
        stored.packing_of((8, 400), extents)
    plain = StoredTensor("scales", Role.SCALE, "float16", ("G", "N", 1), group_multiple=8)
    assert plain.shape({"N": 5, "K": 9, "G": 9}) == (16, 5, 1)


LINEAR = "model.layers.1.mlp.down_proj"
N, K = 256, 512


def test_gptq_files() -> None:
    """Continuous streams along K, zero points along N less one, wrapped by field or by word."""
    for name, bits, bump in (
        ("gptqmodel-gptq-w2-g64-asym", 2, ZeroBump.WORD),
        ("gptqmodel-gptq-w3-g128-asym", 3, ZeroBump.FIELD),
        ("gptqmodel-gptq-w4-g32-asym-descact", 4, ZeroBump.WORD),
        ("gptqmodel-gptq-w8-g64-asym-descact", 8, ZeroBump.WORD),
        ("gptqmodel-gptqv2-w4-g64-asym", 4, ZeroBump.NONE),
    ):
        tensors = checkpoint_tensors(name)
        codes = unpack(tensors[f"{LINEAR}.qweight"], Packing(bits), K, 0).t().float()
        zero = unpack(tensors[f"{LINEAR}.qzeros"], Packing(bits, "N", zero_bump=bump), N, 1).t()
        group = tensors[f"{LINEAR}.g_idx"].long()
        scale = tensors[f"{LINEAR}.scales"].float().t()
        weight = (codes - zero.float()[:, group]) * scale[:, group]
        assert_matches_reference(weight, checkpoint_reference(name), LINEAR)


def test_gptq_bit_planes() -> None:
    name = "gptqmodel-gptqp-w6-g128-sym"
    tensors = checkpoint_tensors(name)
    planes = Packing(6, planes=(4, 2))
    codes = unpack(tensors[f"{LINEAR}.qweight"], planes, K, 0).t().float()
    zero = unpack(tensors[f"{LINEAR}.qzeros"], planes, N, 1).t().float()
    scale, group = tensors[f"{LINEAR}.scales"].float().t(), torch.arange(K) // 128
    weight = (codes - zero[:, group]) * scale[:, group]
    assert_matches_reference(weight, checkpoint_reference(name), LINEAR)


def test_awq_files() -> None:
    name = "autoawq-awq-gemm-g128-asym"
    tensors = checkpoint_tensors(name)
    packing = Packing(4, "N", order=AWQ_ORDER)
    codes = unpack(tensors[f"{LINEAR}.qweight"], packing, N, 1).t().float()
    zero = unpack(tensors[f"{LINEAR}.qzeros"], packing, N, 1).t().float()
    scale, group = tensors[f"{LINEAR}.scales"].float().t(), torch.arange(K) // 128
    weight = (codes - zero[:, group]) * scale[:, group]
    assert_matches_reference(weight, checkpoint_reference(name), LINEAR)


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [
        ("llmcompressor-w2a16-asym-g32", 2, 32),
        ("llmcompressor-w3a16-asym-g64", 3, 64),
        ("llmcompressor-w5a16-sym-g128", 5, 128),
        ("llmcompressor-w6a16-asym-g64", 6, 64),
        ("llmcompressor-w8a16-asym-g64", 8, 64),
    ],
)
def test_compressed_tensors_files(name: str, bits: int, group: int) -> None:
    tensors = checkpoint_tensors(name)
    codes = unpack(tensors[f"{LINEAR}.weight_packed"], Packing(bits), K, 1).float()
    zero = torch.full((N, K // group), float(1 << (bits - 1)))
    if f"{LINEAR}.weight_zero_point" in tensors:
        zero = unpack(tensors[f"{LINEAR}.weight_zero_point"], Packing(bits, "N"), N, 0).float()
    index = torch.arange(K) // group
    scale = tensors[f"{LINEAR}.weight_scale"].float()
    weight = (codes - zero[:, index]) * scale[:, index]
    assert_matches_reference(weight, checkpoint_reference(name), LINEAR)
    # What the file holds is also what pack writes.
    assert torch.equal(
        pack(codes.to(torch.uint8), Packing(bits)), tensors[f"{LINEAR}.weight_packed"]
    )
