# SPDX-License-Identifier: Apache-2.0
"""The ops that write Marlin's layout: bit for bit what vLLM's own Python packers write, and what
they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.model_executor.layers.quantization.utils import marlin_utils

from tests.support.marlin_weights import finite, generator, vllm_weight
from tests.support.messages import saying
from vllm.compressed_linear.machine import native

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
SHAPES = [(64, 16), (64, 128), (128, 64), (192, 208), (320, 272), (256, 1040)]
"""N and K, whose pieces of 128 channels and of 64 are not all whole."""


@pytest.mark.parametrize("element", ["uint4", "uint8", "e4m3"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_of_the_standard_layout(isa: str, shape: tuple[int, int], element: str) -> None:
    n, k = shape
    bits = 4 if element == "uint4" else 8
    codes = torch.randint(1 << bits, shape, generator=generator(n), dtype=torch.uint8)
    codes = finite(codes) if element == "e4m3" else codes
    packed = torch.full((k // 16, n * bits // 2), -1, dtype=torch.int32)
    torch.ops.compressed_linear.pack_rows("marlin", packed, codes, 0, n, k, element)
    assert torch.equal(packed, vllm_weight(codes, bits))
    unpacked = torch.ops.compressed_linear.unpack_rows("marlin", packed, n, k, k, element)
    assert torch.equal(unpacked, codes)


@given(
    tiles=st.integers(1, 5),
    strips=st.integers(1, 20),
    bits=st.sampled_from([4, 8]),
    cut=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_repack_then_unpack_is_the_identity(
    tiles: int, strips: int, bits: int, cut: int, seed: int
) -> None:
    """Whatever the shape, and also when the rows come in two pieces."""
    n, k, element = 64 * tiles, 16 * strips, f"uint{bits}"
    codes = torch.randint(1 << bits, (n, k), generator=generator(seed), dtype=torch.uint8)
    packed = torch.full((k // 16, n * bits // 2), -1, dtype=torch.int32)
    cut = min(16 * cut, n)
    for start, stop in ((0, cut), (cut, n)):
        rows = codes[start:stop]
        torch.ops.compressed_linear.pack_rows("marlin", packed, rows, start, n, k, element)
    unpacked = torch.ops.compressed_linear.unpack_rows("marlin", packed, n, k, k, element)
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("group", [-1, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_scales(group: int, dtype: torch.dtype, transposed: bool) -> None:
    n, k = 192, 384
    groups = 1 if group == -1 else k // group
    scale = torch.randn(n, groups, generator=generator(group)).to(dtype)
    expected = marlin_utils.marlin_permute_scales(scale.t().contiguous(), k, n, group)
    stored = scale.t().contiguous().t() if transposed else scale
    columns = "channel" if group == -1 else "grouped"
    got = torch.ops.compressed_linear.marlin_scales(stored, columns)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


def test_bias() -> None:
    bias = torch.randn(192, generator=generator(1)).half()
    got = torch.ops.compressed_linear.marlin_scales(bias.unsqueeze(1), "channel")
    assert torch.equal(got[0], marlin_utils.marlin_permute_bias(bias))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_zero_points(bits: int, groups: int) -> None:
    zero = torch.randint(1 << bits, (320, groups), generator=generator(bits), dtype=torch.uint8)
    got = torch.ops.compressed_linear.marlin_zeros(zero, bits)
    expected = marlin_utils.marlin_zero_points(
        zero.t().contiguous().to(torch.int32), groups, 320, bits
    )
    assert torch.equal(got, expected)


def arguments(**changes: Any) -> dict[str, Any]:
    """Of a call that repacks [64, 32] 4-bit codes from int32 [64, 4]."""
    return {
        "layout": "marlin",
        "packed": torch.zeros(2, 128, dtype=torch.int32),
        "stored": torch.zeros(64, 4, dtype=torch.int32),
        "order": "n_major",
        "k_at": (torch.arange(32, dtype=torch.int32) * 4).reshape(1, 32),
        "n_at": None,
        "widths": [4],
        "flip": 0,
        "n_first": 0,
        "rows": 64,
        "blank": 0,
        "blank_code": 0,
        "row_start": 0,
        "n": 64,
        "group_size": 32,
        "element": "uint4",
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": torch.zeros(2, 64, dtype=torch.int32)}, ("packed", [2, 64])),
        ({"packed": torch.zeros(2, 128, dtype=torch.uint8)}, ("packed", "uint8", "int32")),
        ({"n": 80}, ("n", 80, "multiple", 64)),
        ({"k_at": torch.zeros(1, 24, dtype=torch.int32)}, ("k", 24, "multiple", 16)),
        ({"k_at": torch.zeros((), dtype=torch.int32)}, ("k_at", "[]")),
        ({"k_at": torch.full((1, 32), 128, dtype=torch.int32)}, ("k_at", 128)),
        ({"widths": [3]}, ("widths", 3)),
        ({"element": "uint3"}, ("element", "'uint3'", "uint4", "uint8", "e4m3", "e5m2")),
        ({"element": "bf16"}, ("element", "'bf16'")),
        ({"rows": 65}, (65,)),
        ({"row_start": 8, "rows": 56}, ("row_start", 8)),
    ],
)
def test_what_the_repack_refuses(changes: dict[str, Any], message: tuple[object, ...]) -> None:
    torch.ops.compressed_linear.repack_codes(**arguments())
    with pytest.raises(ValueError, match=saying("compressed_linear::repack_codes", *message)):
        torch.ops.compressed_linear.repack_codes(**arguments(**changes))


@pytest.mark.parametrize(
    ("op", "given", "message"),
    [
        ("marlin_scales", (torch.zeros(60, 2), "grouped"), ("n", 60)),
        ("marlin_scales", (torch.zeros(64), "grouped"), ("scale", [64])),
        ("marlin_scales", (torch.zeros(64, 2), "rows"), ("columns", "'rows'")),
        ("marlin_scales", (torch.zeros(64, 2), "byte"), ("scale", "float32", "byte")),
        ("marlin_scales", (torch.zeros(64, 2).double(), "grouped"), ("scale", "float64")),
        ("marlin_zeros", (torch.zeros(64, 2, dtype=torch.uint8), 3), ("bits", 3)),
        ("marlin_zeros", (torch.zeros(64, 2), 4), ("zero", "float32", "uint8")),
        ("marlin_zeros", (torch.full((64, 2), 16, dtype=torch.uint8), 4), (4,)),
        (
            "pack_rows",
            (
                "marlin",
                torch.zeros(1, 128, dtype=torch.int32),
                torch.full((64, 16), 16, dtype=torch.uint8),
                0,
                64,
                16,
                "uint4",
            ),
            ("rows", 4),
        ),
    ],
)
def test_what_the_other_ops_refuse(
    op: str, given: tuple[Any, ...], message: tuple[object, ...]
) -> None:
    with pytest.raises(ValueError, match=saying(f"compressed_linear::{op}", *message)):
        getattr(torch.ops.compressed_linear, op)(*given)


def test_fake_kernels_have_the_shapes_of_the_ops() -> None:
    ops = torch.ops.compressed_linear
    packed = torch.zeros(2, 128, dtype=torch.int32)
    rows = torch.zeros(64, 32, dtype=torch.uint8)
    for op, args in (
        (ops.pack_rows, ("marlin", packed, rows, 0, 64, 32, "uint4")),
        (ops.repack_codes, tuple(arguments().values())),
        (ops.unpack_rows, ("marlin", packed, 64, 32, 32, "uint4")),
        (ops.marlin_scales, (torch.ones(64, 2), "grouped")),
        (ops.marlin_zeros, (torch.zeros(64, 2, dtype=torch.uint8), 4)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_cuda_kernels_are_left_out_where_torch_has_no_cuda() -> None:
    assert native.cuda_available() == f"torch {torch.__version__} has no CUDA"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "CUDA kernels not built"), (b"no library", "CUDA kernels cannot be loaded")],
)
def test_why_there_are_no_cuda_kernels(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the other ops depends on them."""
    library = tmp_path / "libcompressed_linear_cuda.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "CUDA_LIBRARY", library)
    found = native._load_cuda()
    assert found is not None
    assert found.startswith(reason)
