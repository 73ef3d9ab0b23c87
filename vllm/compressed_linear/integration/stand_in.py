# SPDX-License-Identifier: Apache-2.0
"""Stand-in for the natural weight of a layer that keeps its weight prepared.

vLLM takes dtype, device and width of a layer from its ``weight``, and compares the heads and
embedding tables of a target and its drafter: if they are equal, the drafter's are thrown away. Two
empty tensors of one shape are equal whatever the layers hold, and most operations on an empty
tensor succeed with a wrong result. A ``StandIn`` is equal to what holds the same weight, and to
nothing else; every operation that needs values raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.nn import Parameter


class NoNaturalWeightError(RuntimeError):
    """Code outside this package needs the values of a weight that only exists prepared."""


class HeldWeight(Protocol):
    """The prepared weight for which a tensor stands in."""

    def same_as(self, other: Any) -> bool:
        """Whether ``other`` gives the same results for every input."""


_METADATA = frozenset(
    (
        *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "layout"),
        *("storage_offset", "data_ptr", "untyped_storage", "get_device", "type"),
        *("requires_grad_", "empty_like", "new_empty", "share_memory_", "record_stream"),
        *("__repr__", "__format__", "__hash__", "__set__", "__delete__"),
    )
)
_PREDICATES = re.compile("_?(is|has)_[a-z]")
"""Such as ``is_contiguous``, and ``_is_view`` of torch's own bookkeeping."""
_MOVES = frozenset(
    ("detach", "clone", "to", "cpu", "cuda", "xpu", "contiguous", "pin_memory", "copy_")
)
_VIEWS = frozenset(("T", "mT", "H", "mH", "real", "imag"))
"""Attributes of tensors that are no metadata."""


class StandIn(Parameter):
    """Empty tensor of ``shape`` (its first length is 0) that stands in for a weight of ``layer``.

    ``held`` gives the prepared weight, or None if there is none to compare with.
    """

    layer: str
    held: Callable[[], HeldWeight | None] | None

    def __new__(
        cls,
        layer: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        held: Callable[[], HeldWeight | None] | None = None,
    ) -> StandIn:
        assert shape[0] == 0, f"{layer}: a stand-in of shape {list(shape)} would have values"
        self: StandIn = super().__new__(cls, torch.empty(shape, dtype=dtype, device=device), False)
        self.layer, self.held = layer, held
        return self

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "equal":
            return _equal(*args[:2])
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
            allowed = name not in _VIEWS
        else:
            allowed = name in _METADATA or name in _MOVES or bool(_PREDICATES.match(name))
        if not allowed:
            raise _refusal(name, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        first = args[0] if args else None
        moved = name in _MOVES or name == "data"
        if moved and isinstance(first, StandIn) and isinstance(out, torch.Tensor):
            return out if out is first else first._like(out)
        return out

    def _like(self, moved: torch.Tensor) -> StandIn:
        return StandIn(self.layer, tuple(moved.shape), moved.dtype, moved.device, self.held)

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        return memo.setdefault(id(self), self._like(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # What is held belongs to the layer, which a copy is not attached to.
        return StandIn, (self.layer, tuple(self.shape), self.dtype, self.device)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StandIn({self.layer}, {self.dtype}, {self.device})"


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if not (isinstance(one, StandIn) and isinstance(other, StandIn)) or not one.held:
        return False
    mine, theirs = one.held(), other.held() if other.held else None
    return mine is not None and theirs is not None and mine.same_as(theirs)


def _refusal(
    operation: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> NoNaturalWeightError:
    given = [*args, *kwargs.values()]
    given += [item for value in given if isinstance(value, list | tuple) for item in value]
    layer = next((value.layer for value in given if isinstance(value, StandIn)), "a layer")
    return NoNaturalWeightError(
        f"{layer}: the operation {operation!r} needs the values of its weight, but the weight is "
        "only kept in the form its backend reads, and this tensor stands in for it with its dtype "
        "and device. Call the layer (or its quant_method.apply and quant_method.embedding) "
        "instead, or serve this model with VLLM_COMPRESSED_LINEAR=0"
    )
