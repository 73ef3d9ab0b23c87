# SPDX-License-Identifier: Apache-2.0
"""Malformed arguments straight into the ops that pack and unpack: taken or refused, no crash.

``test_arguments.py`` does it for the products. Under the address sanitizer
(``docs/verification.md``) these tests also find accesses outside of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm.compressed_linear.machine import native

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))

N, K, GROUP = 24, 64, 32
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (*INTEGERS, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool)
NUMBERS = (-(2**63), -(2**31), -17, -1, 0, 1, 2, 7, 8, 15, 16, 17, 31, 64, 2**31, 2**40, 2**63 - 1)
ELEMENTS = ("uint1", "uint3", "uint4", "uint8", "bf16", "fp16", "e4m3", "e5m2", "fp4_e2m1", "", "x")

Arguments = dict[str, Any]


def _packed(element: str, layout: str = "planes") -> torch.Tensor:
    shape = torch.ops.compressed_linear.packed_shape(layout, N, K, GROUP, element)
    return torch.zeros(shape, dtype=torch.uint8)


OPS: dict[str, Callable[[], Arguments]] = {
    "packed_shape": lambda: {
        "layout": "planes",
        "n": N,
        "k": K,
        "group_size": GROUP,
        "element": "uint4",
    },
    "pack_rows": lambda: {
        "layout": "planes",
        "packed": _packed("uint4"),
        "rows": torch.zeros(N, K, dtype=torch.uint8),
        "row_start": 0,
        "n": N,
        "group_size": GROUP,
        "element": "uint4",
    },
    "repack_codes": lambda: {
        "layout": "planes",
        "packed": _packed("uint4"),
        "stored": torch.zeros(N, K // 8, dtype=torch.int32),
        "order": "n_major",
        "k_at": (torch.arange(K, dtype=torch.int32) * 4).reshape(1, K),
        "n_at": None,
        "widths": [4],
        "flip": 0,
        "n_first": 0,
        "rows": N,
        "blank": 0,
        "blank_code": 0,
        "row_start": 0,
        "n": N,
        "group_size": GROUP,
        "element": "uint4",
    },
    "unpack_rows": lambda: {
        "layout": "planes",
        "packed": _packed("uint4"),
        "n": N,
        "k": K,
        "group_size": GROUP,
        "element": "uint4",
    },
    "code_sums": lambda: {
        "packed": _packed("uint4", "quads"),
        "n": N,
        "k": K,
        "group_size": GROUP,
        "element": "uint4",
        "activation_group": 0,
    },
    "marlin_scales": lambda: {
        "scale": torch.rand(64, 2, dtype=torch.float16),
        "columns": "grouped",
    },
    "marlin_zeros": lambda: {"zero": torch.zeros(64, 2, dtype=torch.uint8), "bits": 4},
    "layout_id": lambda: {"layout": "planes"},
    "isa": lambda: {"kernels": "floats"},
    "supported_isas": lambda: {"kernels": "floats"},
}


@st.composite
def tensors(draw: st.DrawFn, values: torch.Tensor) -> torch.Tensor:
    """Another shape, rank, dtype, other numbers, or other strides."""
    what = draw(st.sampled_from(["shape", "rank", "dtype", "numbers", "strides", "empty"]))
    shape = list(values.shape)
    if what == "dtype":
        return values.to(draw(st.sampled_from(DTYPES)))
    if what == "numbers":
        number = draw(st.sampled_from([-(2**31), -1, 1, 7, 127, 255, 2**31 - 1]))
        limits = torch.finfo if values.is_floating_point() else torch.iinfo
        number = min(max(number, limits(values.dtype).min), limits(values.dtype).max)
        return torch.full_like(values, number)
    if what == "strides":
        wide = torch.zeros([2 * size for size in shape], dtype=values.dtype)
        return wide[tuple(slice(None, None, 2) for _ in shape)]
    if what == "empty":
        return values[:0]
    if what == "rank":
        return values.flatten() if draw(st.booleans()) else values.unsqueeze(0)
    at = draw(st.integers(0, len(shape) - 1))
    shape[at] = draw(st.integers(0, 2 * shape[at] + 1))
    return torch.zeros(shape, dtype=values.dtype)


def others(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, torch.Tensor):
        return tensors(value)
    if isinstance(value, int):
        return st.one_of(st.sampled_from(NUMBERS), st.integers(-3, 130))
    if isinstance(value, list):
        return st.lists(st.sampled_from([*NUMBERS, 3, 4, 5]), max_size=9)
    if value is None:
        return st.just(torch.zeros(1, N, dtype=torch.int32))
    words = ("planes", "quads", "n_major", "k_words", "k_major", "grouped", "channel", "byte")
    return st.sampled_from((*words, *ELEMENTS, "floats", "integers", "x" * 1000, "\0", "é"))


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_malformed_arguments_are_taken_or_refused(op: str, data: st.DataObject) -> None:
    valid = OPS[op]()
    names = data.draw(st.lists(st.sampled_from(list(valid)), min_size=1, max_size=3, unique=True))
    changed = valid | {name: data.draw(others(valid[name]), label=name) for name in names}
    with suppress(ValueError, RuntimeError, TypeError):
        getattr(torch.ops.compressed_linear, op)(**changed)


@pytest.mark.parametrize("op", OPS)
def test_the_arguments_that_are_changed_are_right(op: str) -> None:
    getattr(torch.ops.compressed_linear, op)(**OPS[op]())
