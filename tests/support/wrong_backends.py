# SPDX-License-Identifier: Apache-2.0
"""Backends that are wrong on purpose, each in one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from vllm.compressed_linear.backends.base import QuantLinearMethod, Verdict
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.testing import Case


class Wrong(ReferenceBackend):
    """A correct backend; each test changes one thing."""

    name = "wrong"


def wrong_backend(**methods: Any) -> type[QuantLinearMethod]:
    return type("WrongBackend", (Wrong,), methods)


def _prep(
    change: Callable[[dict[str, torch.Tensor]], Any],
) -> Callable[[QuantLinearMethod, CompressedWeights], Any]:
    def prep(self: QuantLinearMethod, weights: CompressedWeights) -> Any:
        tensors = ReferenceBackend.prep_weights_for_execution(self, weights)  # type: ignore[arg-type]
        return change(tensors)

    return prep


def changed_apply(
    change: Callable[..., Any],
) -> Callable[[QuantLinearMethod, Mapping[str, torch.Tensor], torch.Tensor, Any], Any]:
    """``change(right, tensors, x, bias)`` with ``right`` the correct ``apply``."""

    def apply(
        self: QuantLinearMethod,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> Any:
        def right(tensors: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return ReferenceBackend.apply(self, tensors, x, bias)  # type: ignore[arg-type]

        return change(right, tensors, x, bias)

    return apply


def _embedding(
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[QuantLinearMethod, Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]:
    """``change(rows, ids)`` with ``rows`` what the correct ``embedding`` gives."""

    def embedding(
        self: QuantLinearMethod, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor
    ) -> torch.Tensor:
        return change(ReferenceBackend.embedding(self, tensors, ids), ids)  # type: ignore[arg-type]

    return embedding


CASE = Case(uint(4), 33, 96, zero="integer", bias_dtype="bfloat16", order="act")
"""The case that the wrong backends below are given."""


def _scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors["scale"][-1, -1] *= 1.5
    return tensors


def _crash_when_empty(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
    if x.numel() == 0:
        raise RuntimeError("no rows")
    return right(tensors, x, bias)


def _spoil_x(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
    out = right(tensors, x, bias)
    if 0 not in x.stride():
        x.mul_(0.5)
    return out


def _one_row_for_all(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
    """Quantizes x with one scale for the whole batch, as a dynamic per-tensor scheme would."""
    step = x.abs().max().clamp(min=1e-9) / 127 if x.numel() else 1.0
    return right(tensors, (x / step).round() * step, bias)


def _ignore_strides(right: Any, tensors: Any, x: torch.Tensor, bias: Any) -> Any:
    memory = torch.as_strided(x, x.shape, torch.empty(x.shape).stride(), x.storage_offset())
    return right(tensors, memory, bias)


class _Keeps(Wrong):
    """Computes with tensors it kept on the class instead of those it returned."""

    kept: ClassVar[dict[str, torch.Tensor]] = {}

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        _Keeps.kept = super().prep_weights_for_execution(weights)
        return dict(_Keeps.kept)

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return super().apply(_Keeps.kept, x, bias)


class _NeedsItsInstance(Wrong):
    """Remembers in ``self`` what preparation found out."""

    def prep_weights_for_execution(self, weights: CompressedWeights) -> dict[str, torch.Tensor]:
        self.tensors = super().prep_weights_for_execution(weights)
        return self.tensors

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return super().apply(self.tensors, x, bias)


class _Stateful(Wrong):
    """Declines every second time."""

    asked: ClassVar[int] = 0

    @classmethod
    def can_implement(cls, descriptor: CompressedLinearDescriptor, platform: Platform) -> Verdict:
        cls.asked += 1
        return Verdict(("not today",) if cls.asked % 2 == 0 else ())


def _unwritten(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Allocates a row more than it writes, and the last group's scale is that row's."""
    scale = tensors["scale"]
    tensors["scale"] = torch.empty(scale.shape, dtype=scale.dtype)
    tensors["scale"][:-1] = scale[:-1]
    return tensors


WRONG: dict[str, tuple[type[QuantLinearMethod], str, str]] = {
    "looked up in another order": (
        wrong_backend(embedding=_embedding(lambda rows, ids: rows.flip(-1))),
        "ids [N]",
        "too far off",
    ),
    "looked up flat": (
        wrong_backend(embedding=_embedding(lambda rows, ids: rows.flatten(0, -2))),
        "ids [2, 3]",
        "expected torch.bfloat16 of shape [2, 3, 96]",
    ),
    "looked up by the company": (
        wrong_backend(
            embedding=_embedding(
                lambda rows, ids: rows.masked_fill(rows == 0, -0.0) if len(ids) < 33 else rows
            )
        ),
        "one id often",
        "a row has other bits than among all rows",
    ),
    "looks up what it does not declare": (
        wrong_backend(
            capabilities=replace(ReferenceBackend.capabilities, lookup=False),
            can_implement=classmethod(lambda cls, descriptor, platform: Verdict()),
        ),
        "can_implement with lookup",
        "accepted what its capabilities do not declare",
    ),
    "scale": (wrong_backend(prep_weights_for_execution=_prep(_scaled)), "M=1", "too far off"),
    "dtype": (
        wrong_backend(apply=changed_apply(lambda right, t, x, b: right(t, x, b).float())),
        "M=0",
        "gave torch.float32 of shape",
    ),
    "shape": (
        wrong_backend(apply=changed_apply(lambda right, t, x, b: right(t, x, b).flatten(0, -2))),
        "x [2, 3, K]",
        "expected torch.bfloat16 of shape [2, 3, 33]",
    ),
    "no rows": (
        wrong_backend(apply=changed_apply(_crash_when_empty)),
        "M=0",
        "RuntimeError: no rows",
    ),
    "bias": (
        wrong_backend(apply=changed_apply(lambda right, t, x, b: right(t, x, None))),
        "x of zeros",
        "too far off",
    ),
    "bias twice": (
        wrong_backend(
            apply=changed_apply(lambda right, t, x, b: right(t, x, b) + (0 if b is None else b))
        ),
        "M=1",
        "too far off",
    ),
    "reordering": (
        wrong_backend(
            apply=changed_apply(
                lambda right, t, x, b: right({n: v for n, v in t.items() if n != "order"}, x, b)
            )
        ),
        "M=1",
        "too far off",
    ),
    "strides": (wrong_backend(apply=changed_apply(_ignore_strides)), "x transposed", "too far off"),
    "spoils x": (wrong_backend(apply=changed_apply(_spoil_x)), "M=1", "changed 'x'"),
    "rounds x": (wrong_backend(apply=changed_apply(_one_row_for_all)), "M=17", "too far off"),
    "not a dict": (
        wrong_backend(prep_weights_for_execution=_prep(list)),
        "prepare",
        "expected a dict",
    ),
    "parameters": (
        wrong_backend(
            prep_weights_for_execution=_prep(
                lambda t: {n: torch.nn.Parameter(v, requires_grad=False) for n, v in t.items()}
            )
        ),
        "prepare",
        "expected a dict of plain tensors",
    ),
    "dots in names": (
        wrong_backend(
            prep_weights_for_execution=_prep(lambda t: {f"a.{n}": v for n, v in t.items()}),
            apply=changed_apply(
                lambda right, t, x, b: right({n[2:]: v for n, v in t.items()}, x, b)
            ),
        ),
        "prepare",
        "must be Python identifiers",
    ),
    "forgets to write": (
        wrong_backend(prep_weights_for_execution=_prep(_unwritten)),
        "M=1",
        "too far off",
    ),
    "keeps tensors": (_Keeps, "M=1", "RuntimeError"),
    "keeps state": (_NeedsItsInstance, "M=0", "AttributeError"),
    "changes its mind": (_Stateful, "can_implement", "gave two answers"),
    "no verdict": (
        wrong_backend(can_implement=classmethod(lambda cls, d, p: True)),
        "can_implement",
        "gave True, expected a Verdict",
    ),
    "fails elsewhere": (
        wrong_backend(
            can_implement=classmethod(
                lambda cls, d, p: Verdict(() if p.features else (str(1 / 0),))
            )
        ),
        "can_implement on cuda:90",
        "ZeroDivisionError",
    ),
    "size": (
        wrong_backend(prepared_bytes=classmethod(lambda cls, d: 7)),
        "prepared_bytes",
        "says 7, the tensors have",
    ),
    "seconds": (
        wrong_backend(seconds=classmethod(lambda cls, d, p, m: float("nan"))),
        "seconds",
        "expected finite numbers",
    ),
    "cannot prepare": (
        wrong_backend(prep_weights_for_execution=lambda self, weights: 1 / 0),
        "prepare",
        "ZeroDivisionError",
    ),
}
