# SPDX-License-Identifier: Apache-2.0
"""Codes repacked where they lie in a checkpoint are those that the standard layout shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import op_calls
from tests.support.cpu_library import ISAS
from tests.support.op_calls import LAYOUTS
from tests.support.strategies import AWQ_ORDER, Weight, weights
from vllm.compressed_linear.backends.cpu.int8 import CpuInt8Backend
from vllm.compressed_linear.backends.cpu.packing import Layout, new_packed, pack_codes
from vllm.compressed_linear.backends.cpu.weight_only import CpuBackend
from vllm.compressed_linear.backends.shared.repack import CodeLocation, locate_codes
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.formats.awq import awq_gemm_scheme, awq_gemv_scheme
from vllm.compressed_linear.formats.compressed_tensors_schemes import pack_quantized_scheme
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    CompressedLinearDescriptor,
    ScaleSpec,
    WeightSpec,
)
from vllm.compressed_linear.spec.elements import ElementType, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights, StoredTensor

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
CONTEXT = LayerContext("bfloat16", "bfloat16")


def plain_scheme(
    element: int | ElementType, packing: Packing | None, axes: tuple[str, str], dtype: str = "uint8"
) -> CheckpointScheme:
    """One scale for all channels of a row, codes as ``packing`` says; an int is that many bits."""
    if isinstance(element, int):
        element = uint(element, 1 << (element - 1))
    return CheckpointScheme(
        WeightSpec(element, ScaleSpec("float16", "channel", -1)),
        (
            StoredTensor("codes", Role.CODES, dtype, axes, packing),
            StoredTensor("scale", Role.SCALE, "float16", ("N", "G")),
        ),
    )


SCHEMES = {
    **{f"gptq-{bits}": gptq_scheme(bits, 32, version="gptq_v2") for bits in (2, 3, 4, 8)},
    **{
        f"ct-{bits}": pack_quantized_scheme(bits, 32, symmetric=True, group_index=False)
        for bits in range(1, 9)
    },
    **{
        f"ct-{bits}-not-dense": pack_quantized_scheme(
            bits, 32, symmetric=False, group_index=False, dense_first=False
        )
        for bits in (3, 5, 6, 7)
    },
    "awq": awq_gemm_scheme(32),
    "awq-gemv": awq_gemv_scheme(32),
    "bytes": plain_scheme(8, None, ("N", "K")),
    "bytes-down": plain_scheme(8, None, ("K", "N")),
    "bytes-signed": plain_scheme(8, Packing(8, "K", "int8", signed=True), ("N", "K")),
    "nibbles": plain_scheme(4, Packing(4, "K", "uint8"), ("N", "K")),
    "nibbles-down": plain_scheme(4, Packing(4, "K", "uint8"), ("K", "N")),
    "int16-down": plain_scheme(5, Packing(5, "K", "int16"), ("K", "N")),
    "wide": plain_scheme(5, Packing(5, "K", "int64", dense=False), ("N", "K")),
    "planes": plain_scheme(7, Packing(7, "K", planes=(4, 2, 1)), ("K", "N")),
    "planes-across": plain_scheme(3, Packing(3, "N", planes=(2, 1)), ("K", "N")),
    "e4m3": plain_scheme(elements.E4M3, None, ("N", "K"), "float8_e4m3fn"),
    "e5m2-down": plain_scheme(elements.E5M2, None, ("K", "N"), "float8_e5m2"),
    "three-across": plain_scheme(3, Packing(3, "N"), ("K", "N")),
}
"""Layouts that are read without a detour."""
DETOURS = {
    "codes packed along N in columns": plain_scheme(4, Packing(4, "N"), ("N", "K")),
    "columns of int64 containers": plain_scheme(4, Packing(4, "K", "int64"), ("K", "N")),
    "codes without a packing": plain_scheme(4, None, ("N", "K")),
}


def random_shard(
    scheme: CheckpointScheme, n: int, k: int, part: dict[str, int] | None = None, seed: int = 0
) -> LoadedShard:
    """A random weight [n, k] on disk, and of it what a rank with ``part`` of a ``ShardSource``
    keeps; the order of channels is random where the scheme has a group index."""
    generator = torch.Generator().manual_seed(seed)
    bits, groups = scheme.weight.element.bits, scheme.weight.groups(k)
    zero = torch.randint(1 << bits, (n, groups), generator=generator, dtype=torch.uint8)
    codes = torch.randint(1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    if scheme.weight.element.kind == "float":
        codes[(codes & 0x7F) >= 0x7C] = 0  # no infinities, no NaN
    stored = from_standard_layout(
        scheme,
        StandardWeights(
            codes,
            (torch.rand(n, groups, generator=generator) + 0.5).half(),
            zero if any(t.role is Role.ZERO for t in scheme.tensors) else None,
        ),
    )
    return loaded(scheme, stored, n, k, part)


def loaded(
    scheme: CheckpointScheme,
    stored: dict[str, torch.Tensor],
    n: int,
    k: int,
    part: dict[str, int] | None = None,
) -> LoadedShard:
    whole: dict[str, Any] = {"n_start": 0, "n": n, "k_start": 0, "k": k}
    source = ShardSource("layer", scheme, n, k, **(whole | (part or {})))
    kept = {}
    for tensor in scheme.tensors:
        if tensor.name not in stored:
            continue
        value = stored[tensor.name]
        for dim, piece in enumerate(source.slices(tensor, tensor.packing)):
            if piece is not None:
                value = value.narrow(dim, piece.first, min(piece.count, value.shape[dim]))
        kept[tensor.name] = value.contiguous()
    return LoadedShard(source, kept)


def layouts(descriptor: CompressedLinearDescriptor) -> tuple[Layout, ...]:
    return LAYOUTS if descriptor.weight.element.kind == "integer" else LAYOUTS[:1]


def pack_standard(
    packed: torch.Tensor,
    held: CompressedWeights,
    d: CompressedLinearDescriptor,
    element: str,
    layout: Layout,
) -> None:
    """Fill ``packed`` through the standard layout."""
    pack_rows = torch.ops.compressed_linear.pack_rows
    for start, stop in held.chunks(native.TILE):
        codes = held.rows(start, stop).codes.contiguous()
        pack_rows(layout, packed, codes, start, d.n, d.group_size, element)


def packed_both_ways(
    held: CompressedWeights, d: CompressedLinearDescriptor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes in a packed layout, as they are prepared, and through the standard layout."""
    element = CpuBackend(d).element
    shape = new_packed(d, element, layout).shape
    packed, standard = (torch.full(shape, fill, dtype=torch.uint8) for fill in (170, 255))
    pack_codes(packed, held, d, element, layout)
    pack_standard(standard, held, d, element, layout)
    return packed, standard


def check(shards: list[LoadedShard], *, direct: bool = True) -> None:
    for part in refine(shards, CONTEXT):
        d, held = part.descriptor, part.weights
        for layout in layouts(d):
            native.reset_call_counts()
            packed, standard = packed_both_ways(held, d, layout)
            repacked = op_calls.calls(f"repack_codes/{layout}/{native.isa()}")
            assert repacked == (len(held.shards) if direct else 0)
            assert torch.equal(packed, standard)
            unpack_rows = torch.ops.compressed_linear.unpack_rows
            codes = unpack_rows(layout, packed, d.n, d.k, d.group_size, CpuBackend(d).element)
            assert torch.equal(codes, held.rows(0, d.n).codes)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(64, 256), (288, 1184), (7, 96), (23, 33)], ids=str)
def test_every_layout(isa: str, name: str, shape: tuple[int, int]) -> None:
    scheme, (n, k) = SCHEMES[name], shape
    if scheme.weight.scale is not None and scheme.weight.scale.granularity == "group":
        k = -(-k // 32) * 32
    codes = next(t for t in scheme.tensors if t.role is Role.CODES)
    if codes.packing is not None and name != "planes":
        # Packers write whole runs; of three-across and planes-across n is padded.
        k = k if codes.packing.axis == "N" else -(-k // codes.packing.run) * codes.packing.run
    check([random_shard(scheme, n, k)])


@pytest.mark.parametrize("name", ["gptq-4", "gptq-3", "ct-4", "ct-5-not-dense", "awq", "awq-gemv"])
def test_the_shards_of_a_rank(isa: str, name: str) -> None:
    """Parts that begin within a container or a run, joined along N."""
    scheme = SCHEMES[name]
    parts = [
        {"n_start": 16, "n": 48, "k_start": 36, "k": 156},
        {"n_start": 4, "n": 32, "k_start": 36, "k": 156},
        {"n_start": 60, "n": 20, "k_start": 36, "k": 156},
    ]
    check([random_shard(scheme, 96, 256, part, seed) for seed, part in enumerate(parts)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fill", [False, True])
def test_activation_order(isa: str, bits: int, fill: bool) -> None:
    """Channels in any order, also where groups of unlike sizes are filled up with none."""
    shard = random_shard(gptq_scheme(bits, 32, version="gptq_v2"), 80, 3072)
    order = torch.randperm(3072, generator=torch.Generator().manual_seed(bits))
    index = (torch.arange(3072, dtype=torch.int32) // 32)[order]
    if fill:
        index[: 3072 // 3] = index[3]
    shard = LoadedShard(shard.source, {**shard.tensors, "g_idx": index})
    check([shard])
    [part] = refine([shard], CONTEXT)
    assert part.weights.permutation is not None
    assert bool((part.weights.permutation < 0).any()) == fill


def test_blank_rows_of_a_padded_vocabulary(isa: str) -> None:
    for name in ("gptq-4", "awq", "ct-3"):
        part = {"n": 40, "n_start": 16, "padding": 24}
        check([random_shard(SCHEMES[name], 56, 96, part)])


@pytest.mark.parametrize("name", ["bytes-signed", "ct-4", "gptq-4", "awq"])
def test_backends_read_codes_where_they_lie(isa: str, name: str) -> None:
    """Also int8 [N, K], as compressed-tensors writes W8A8."""
    shard = random_shard(SCHEMES[name], 80, 192)
    [part] = refine([shard], CONTEXT)
    activation = ActivationSpec(elements.INT8, True, "token")
    for backend, layout, d in (
        (CpuBackend, "planes", part.descriptor),
        (CpuInt8Backend, "quads", replace(part.descriptor, activation=activation)),
    ):
        native.reset_call_counts()
        packed = backend(d).prep_weights_for_execution(part.weights)["packed"]
        assert op_calls.calls(f"repack_codes/{layout}") == 1
        assert op_calls.calls("pack_rows") == 0
        assert torch.equal(packed, packed_both_ways(part.weights, d, layout)[1])


@pytest.mark.parametrize("reason", DETOURS)
def test_what_cannot_be_read_in_place_takes_the_standard_layout(reason: str) -> None:
    shard = random_shard(DETOURS[reason], 48, 64)
    assert locate_codes(shard, None, 64, "uint4") == reason
    check([shard], direct=False)


def test_shards_that_share_a_tile_take_the_standard_layout() -> None:
    scheme = SCHEMES["gptq-4"]
    shards = [random_shard(scheme, n, 64, seed=n) for n in (24, 40)]
    check(shards, direct=False)


@pytest.mark.parametrize("isa_name", ISAS)
@settings(max_examples=60, deadline=None)
@given(weight=weights(), data=st.data())
def test_any_weight(isa_name: str, weight: Weight, data: st.DataObject) -> None:
    n, k = weight.standard.codes.shape
    part = {}
    if data.draw(st.booleans()) and weight.group_index is None:
        for axis, length in (("n", n), ("k", k)):
            part[f"{axis}_start"] = data.draw(st.integers(0, length - 1))
            part[axis] = data.draw(st.integers(1, length - part[f"{axis}_start"]))
    stored = from_standard_layout(weight.scheme, weight.standard, weight.group_index)
    shard = loaded(weight.scheme, stored, n, k, part)
    [refined] = refine([shard], CONTEXT)
    d = refined.descriptor
    torch.ops.compressed_linear.select_isa("floats", isa_name)
    try:
        for layout in layouts(d):
            packed, standard = packed_both_ways(refined.weights, d, layout)
            assert torch.equal(packed, standard)
    finally:
        torch.ops.compressed_linear.select_isa("floats", "")


def test_locations_name_bits_and_rows() -> None:
    awq = locate_codes(random_shard(SCHEMES["awq"], 64, 96), None, 96, "uint4")
    assert isinstance(awq, CodeLocation)
    assert awq.order == "k_major"
    assert awq.k_at.tolist() == list(range(96))
    assert awq.n_at is not None
    # Slot i of a word holds channel AWQ_ORDER[i].
    assert [awq.n_at[0, channel].item() // 4 for channel in AWQ_ORDER] == list(range(8))
    gptq = locate_codes(random_shard(SCHEMES["gptq-3"], 64, 96), None, 96, "uint3")
    assert isinstance(gptq, CodeLocation)
    assert gptq.order == "k_words"
    assert gptq.k_at[0].tolist() == [3 * k for k in range(96)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_the_result(layout: Layout) -> None:
    shard = random_shard(SCHEMES["gptq-4"], 640, 512)
    [part] = refine([shard], CONTEXT)
    d, threads = part.descriptor, torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            packed = torch.empty(40, 512 * 8, dtype=torch.uint8)
            pack_codes(packed, part.weights, d, "uint4", layout)
            results.append(packed)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
