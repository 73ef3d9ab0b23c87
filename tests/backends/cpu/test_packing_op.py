# SPDX-License-Identifier: Apache-2.0
"""What the ops that repack codes take, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.messages import saying
from tests.support.op_calls import LAYOUTS
from vllm.compressed_linear.backends.cpu.packing import Layout
from vllm.compressed_linear.machine import native

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


def arguments(**changes: Any) -> dict[str, Any]:
    """Of a call that packs [16, 32] 4-bit codes from int32 [16, 4]."""
    return {
        "packed": torch.zeros(1, 256, dtype=torch.uint8),
        "stored": torch.zeros(16, 4, dtype=torch.int32),
        "order": "n_major",
        "k_at": (torch.arange(32, dtype=torch.int32) * 4).reshape(1, 32),
        "n_at": None,
        "widths": [4],
        "flip": 0,
        "n_first": 0,
        "rows": 16,
        "blank": 0,
        "blank_code": 0,
        "row_start": 0,
        "n": 16,
        "group_size": 32,
        "element": "uint4",
    } | changes


K_MAJOR = {
    "order": "k_major",
    "stored": torch.zeros(32, 2, dtype=torch.int32),
    "k_at": torch.arange(32, dtype=torch.int32),
    "n_at": (torch.arange(16, dtype=torch.int32) * 4).reshape(1, 16),
}
COLUMNS = {"order": "k_words", "stored": torch.zeros(4, 16, dtype=torch.int32)}
BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "order": ({"order": "rows"}, ("order", "'rows'", "n_major", "k_words", "k_major")),
    "float": ({"element": "bf16"}, ("element", "bf16")),
    "stored dtype": ({"stored": torch.zeros(16, 4)}, ("stored", "float32", "uint8", "int8")),
    "stored rank": ({"stored": torch.zeros(64).int()}, ("stored", [64])),
    "strided": ({"stored": torch.zeros(4, 16).int().t()}, ("stored", "contiguous")),
    "packed": ({"n": 17}, ("packed", [1, 256], [2, 256])),
    "width": ({"widths": [0, 4]}, ("widths", 0, 1, 8)),
    "widths": ({"widths": [2, 1]}, ("widths", 3, 4, "uint4")),
    "many widths": ({"widths": [1] * 9}, ("widths", 9, 4, "uint4")),
    "flip": ({"flip": 16}, ("flip", 16, 4)),
    "negative": ({"rows": -1}, ("rows", "blank", "n_first", -1, 0, 0, 0)),
    "blank": ({"blank_code": 16}, ("blank_code", 16, "uint4")),
    "start": ({"row_start": 8}, ("row_start", 8, "multiple", 16)),
    "end": ({"blank": 8}, ("rows", 24, 16, 16)),
    "rows": ({"n_first": 1}, (17, [16, 4])),
    "k_at rank": ({"k_at": torch.zeros(32).int()}, ("k_at", [32])),
    "k_at planes": ({"widths": [2, 2]}, ("k_at", [1, 32])),
    "k_at dtype": ({"k_at": torch.zeros(1, 32).long()}, ("k_at", "int64", "int32")),
    "k_at": (
        {"k_at": torch.full((1, 32), 125).int()},
        ("k_at", 125, 128),
    ),
    "columns": (
        {**COLUMNS, "k_at": torch.full((1, 32), 126).int()},
        ("k_at", 126, 128),
    ),
    "wide columns": (
        {"order": "k_words", "stored": torch.zeros(4, 16).long()},
        ("stored", "int64", 32, "k_words"),
    ),
    "n_at": ({"n_at": K_MAJOR["n_at"]}, ("n_at", "given", "k_major")),
    "no n_at": ({**K_MAJOR, "n_at": None}, ("n_at", "missing", "k_major")),
    "n_at shape": (
        {**K_MAJOR, "n_at": torch.zeros(1, 15).int()},
        ("n_at", [1, 15], [1, 16]),
    ),
    "n_at low": ({**K_MAJOR, "n_at": torch.full((1, 16), -1).int()}, ("n_at", -1, 0)),
    "n_at high": (
        {**K_MAJOR, "n_at": torch.full((1, 16), 61).int()},
        ("n_at", 61, 64),
    ),
    "k row": (
        {**K_MAJOR, "k_at": torch.full((32,), 32).int()},
        ("k_at", "row", 32, [32, 2]),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_wrong_arguments_are_named(layout: Layout, case: str) -> None:
    changes, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=saying("compressed_linear::repack_codes", *message)):
        torch.ops.compressed_linear.repack_codes(layout, **arguments(**changes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("changes", [{}, K_MAJOR, COLUMNS], ids=["n_major", "k_major", "k_words"])
def test_right_arguments_are_taken(layout: Layout, changes: dict[str, Any]) -> None:
    repack = torch.ops.compressed_linear.repack_codes
    repack(layout, **arguments(**changes))
    torch.library.opcheck(repack.default, (layout, *arguments(**changes).values()))


@pytest.mark.parametrize("element", ["bf16", "e4m3"])
def test_integer_activations_meet_integers_only(element: str) -> None:
    with pytest.raises(ValueError, match=saying("element", f"'{element}'", "uint1", "uint8")):
        torch.ops.compressed_linear.repack_codes("quads", **arguments(element=element, widths=[8]))


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_nan_among_small_floats_is_an_error(isa: str, element: str) -> None:
    stored = torch.zeros(16, 32, dtype=torch.uint8)
    stored[9, 30] = 0xFF
    changes = {
        "stored": stored,
        "k_at": (torch.arange(32, dtype=torch.int32) * 8).reshape(1, 32),
        "widths": [8],
        "packed": torch.zeros(1, 512, dtype=torch.uint8),
        "element": element,
    }
    with pytest.raises(ValueError, match=saying("stored", "NaN", "finite")):
        torch.ops.compressed_linear.repack_codes("planes", **arguments(**changes))
