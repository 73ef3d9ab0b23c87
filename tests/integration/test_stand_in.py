# SPDX-License-Identifier: Apache-2.0
"""What stands in for a prepared weight tells dtype and device, is equal to nothing that only looks
like it, and never gives a value."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.nn import Linear, Module, Parameter

from tests.support.messages import saying
from vllm.compressed_linear.integration.stand_in import NoNaturalWeightError, StandIn


@dataclass(frozen=True)
class Held:
    content: str

    def same_as(self, other: Held) -> bool:
        return self.content == other.content


def stand_in(layer: str = "lm_head", content: str = "") -> StandIn:
    held = partial(Held, content) if content else None
    return StandIn(layer, (0, 8), torch.bfloat16, torch.device("cpu"), held)


EMPTY = torch.empty(0, 8, dtype=torch.bfloat16)
COPIES: dict[str, Callable[[StandIn], torch.Tensor]] = {
    "itself": lambda w: w,
    "cpu": lambda w: w.cpu(),
    "to": lambda w: w.to(torch.float32).to(torch.bfloat16),
    "data": lambda w: w.data,
    "detach": lambda w: w.detach(),
    "clone": lambda w: w.clone(),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("moved", COPIES)
def test_two_of_one_shape_are_different(moved: str) -> None:
    for one, other in ((stand_in(), stand_in("draft")), (stand_in("a", "x"), stand_in("b", "y"))):
        assert not torch.equal(COPIES[moved](one), COPIES[moved](other))
        assert not COPIES[moved](one).equal(COPIES[moved](other))
    assert not torch.equal(COPIES[moved](stand_in()), EMPTY)
    assert not torch.equal(EMPTY, COPIES[moved](stand_in()))


@pytest.mark.parametrize("moved", COPIES)
def test_those_of_equal_weights_are_equal(moved: str) -> None:
    one, other = stand_in("a", "x"), stand_in("b", "x")
    assert torch.equal(COPIES[moved](one), COPIES[moved](other))
    assert torch.equal(one, one)


def test_a_copy_in_another_process_is_equal_to_nothing() -> None:
    one = stand_in("a", "x")
    other = pickle.loads(pickle.dumps(one))
    assert (other.layer, other.shape, other.dtype) == ("a", (0, 8), torch.bfloat16)
    assert not torch.equal(one, other)
    assert not torch.equal(other, one)


def test_it_tells_what_vllm_asks_of_a_weight() -> None:
    weight = stand_in()
    assert (weight.dtype, weight.device) == (torch.bfloat16, torch.device("cpu"))
    assert (tuple(weight.shape), weight.numel(), weight.nbytes, weight.is_meta) == (
        (0, 8),
        0,
        0,
        False,
    )
    assert isinstance(weight, Parameter)
    assert not weight.requires_grad
    assert "lm_head" in repr(weight)


OPERATIONS: dict[str, Callable[[StandIn], object]] = {
    "==": lambda w: w == stand_in(),
    "allclose": lambda w: torch.allclose(w, stand_in()),
    "all": lambda w: w.all(),
    "sum": lambda w: w.sum(),
    "float": lambda w: w.float(),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "index": lambda w: w[:4],
    "matmul": lambda w: torch.zeros(2, 8, dtype=torch.bfloat16) @ w.t(),
    "linear": lambda w: torch.nn.functional.linear(torch.zeros(2, 8, dtype=torch.bfloat16), w),
    "embedding": lambda w: torch.nn.functional.embedding(torch.zeros(0, dtype=torch.long), w),
    "cat": lambda w: torch.cat([EMPTY, w]),
    "list": lambda w: w.tolist(),
    "numpy": lambda w: w.numpy(),
    "into another": lambda w: torch.empty(0, 8).add_(w),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_use_of_its_values_is_an_error_that_names_the_layer(operation: str) -> None:
    message = saying("model.lm_head", "VLLM_COMPRESSED_LINEAR=0")
    with pytest.raises(NoNaturalWeightError, match=message):
        OPERATIONS[operation](stand_in("model.lm_head"))


def test_a_module_with_one_moves_and_is_traced() -> None:
    class Layer(Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = stand_in()
            self.inner = Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).to(self.weight.device)

    layer = Layer().to(torch.float32)
    assert isinstance(layer.weight, StandIn)
    assert layer.weight.dtype == torch.float32
    assert set(layer.state_dict()) == {"weight", "inner.weight", "inner.bias"}
    x = torch.randn(3, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer.inner(x))
