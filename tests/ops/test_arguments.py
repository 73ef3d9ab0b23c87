# SPDX-License-Identifier: Apache-2.0
"""Arguments that nobody means: an op takes them for what they are or says which one is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import int8_ops, op_calls, weight_only_ops
from tests.support.messages import saying
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import INT8

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))

Arguments = dict[str, Any]

OWN = re.compile("compressed_linear::(make_problem|linear|embedding): ")
"""Ops that may name a wrong argument."""

N, K, GROUP = 40, 96, 32
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.bool,
)


def _optional() -> Arguments:
    """What both products take beside codes and scales, all of it."""
    return {
        "row_scale": torch.rand(N),
        "bias": torch.randn(N),
        "perm": torch.randperm(K).int(),
        "prescale": torch.rand(K) + 0.5,
        "input_scale": torch.tensor([0.03]),
        "input_zero": torch.tensor([4], dtype=torch.int32),
    }


def linear() -> Arguments:
    layer = weight_only_ops.make_layer((N, K, GROUP), "uint4", "integer")
    spec = ActivationSpec(INT8, False, "tensor", symmetric=False)
    return (
        {
            "x": torch.randn(3, K),
            "packed": layer.packed,
            "scale": layer.scale,
            "zero": layer.zero,
            "table": torch.randn(16),
            "n": N,
            "k": K,
            "group_size": GROUP,
            "element": "uint4",
            "element_bias": 0,
            "out_dtype": torch.float32,
        }
        | op_calls.activation(spec)
        | _optional()
    )


def linear_of_quads() -> Arguments:
    spec = ActivationSpec(INT8, False, "tensor", symmetric=False)
    layer = int8_ops.layer(N, K, GROUP, 4, zero=True)
    given = int8_ops.arguments(layer, torch.randn(3, K), spec)
    return given | _optional() | {"layout": "quads"}


def embedding() -> Arguments:
    spec = ActivationSpec(INT8, False, "tensor", symmetric=False)
    left_out = {"x", "bias", "prescale", "input_scale", "input_zero", *op_calls.activation(spec)}
    given = {name: value for name, value in linear().items() if name not in left_out}
    return given | {"ids": torch.tensor([5, 0, 39]), "channels": K}


OPS: dict[str, Callable[[], Arguments]] = {
    "linear": linear,
    "linear of quads": linear_of_quads,
    "embedding": embedding,
}


def call(op: str, given: Arguments) -> torch.Tensor:
    return (op_calls.embedding if op == "embedding" else op_calls.linear)(**given)


def call_or_complaint(op: str, given: Arguments) -> torch.Tensor | str:
    try:
        return call(op, given)
    except ValueError as error:
        return str(error)


@st.composite
def same_values(draw: st.DrawFn, values: torch.Tensor) -> torch.Tensor:
    """The same numbers elsewhere in memory: any strides, any alignment of one element."""
    order = draw(st.permutations(range(values.dim())))
    steps = [draw(st.integers(1, 3)) for _ in order]
    shape = [size * step for size, step in zip(values.shape, steps, strict=True)]
    offset = draw(st.integers(0, 3))
    total = max(1, torch.Size(shape).numel())
    memory = torch.zeros(total + offset, dtype=values.dtype)[offset : offset + total]
    turned = memory.view([shape[i] for i in order]).permute(
        [order.index(i) for i in range(values.dim())]
    )
    view = turned[tuple(slice(None, None, step) for step in steps)]
    view.copy_(values)
    return view


@st.composite
def other_tensors(draw: st.DrawFn, values: torch.Tensor) -> torch.Tensor | None:
    """A tensor of another shape or dtype, or none."""
    what = draw(st.sampled_from(["none", "shape", "rank", "dtype"]))
    if what == "none":
        return None
    if what == "dtype":
        return values.float().to(draw(st.sampled_from(DTYPES)))
    shape = list(values.shape)
    if what == "shape":
        at = draw(st.integers(0, len(shape) - 1))
        shape[at] = draw(st.integers(0, 2 * shape[at] + 1))
    elif draw(st.booleans()):
        shape.insert(draw(st.integers(0, len(shape))), draw(st.integers(0, 2)))
    else:
        del shape[draw(st.integers(0, len(shape) - 1))]
    return torch.ones(shape).to(values.dtype)


def others(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, torch.Tensor):
        return other_tensors(value)
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int):
        return st.one_of(
            st.integers(-3, 200), st.sampled_from([-(2**63), -(2**31), 2**31, 2**40, 2**63 - 1])
        )
    if isinstance(value, float):
        return st.sampled_from([-1.0, 0.0, 1e-40, 448.0, float("inf"), float("nan")])
    if isinstance(value, torch.dtype):
        return st.sampled_from(DTYPES)
    return st.sampled_from(["", "uint3", "uint8", "uint9", "e4m3", "bf16", "int4", "x" * 1000])


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_wherever_numbers_lie_the_result_is_the_same_or_the_place_is_refused(
    op: str, data: st.DataObject
) -> None:
    valid = OPS[op]()
    tensors = [name for name, value in valid.items() if isinstance(value, torch.Tensor)]
    name = data.draw(st.sampled_from(tensors))
    moved = data.draw(same_values(valid[name]))
    if moved.is_contiguous() or name == "x":
        assert torch.equal(call(op, valid | {name: moved}), call(op, valid))
    else:
        with pytest.raises(ValueError, match=saying(OWN, name, "contiguous")):
            call(op, valid | {name: moved})


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_wrong_arguments_are_refused_by_name_or_mean_something(
    op: str, data: st.DataObject
) -> None:
    """Whatever is taken gives a result of the shape that the arguments say."""
    valid = OPS[op]()
    names = data.draw(st.lists(st.sampled_from(list(valid)), min_size=1, max_size=3, unique=True))
    changed = valid | {name: data.draw(others(valid[name]), label=name) for name in names}
    required = ("x", "packed", "ids")
    if any(changed.get(name, 0) is None for name in required):
        return  # torch itself refuses those
    found = call_or_complaint(op, changed)
    if isinstance(found, str):
        assert OWN.match(found)
        return
    rows = changed["ids" if op == "embedding" else "x"].shape[0]
    assert found.shape == (rows, changed["channels" if op == "embedding" else "n"])
    assert found.dtype == changed["out_dtype"]
