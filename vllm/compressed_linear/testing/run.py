# SPDX-License-Identifier: Apache-2.0
"""Run of one case on one backend: the calls of the protocol, comparison with the exact result."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.testing.oracle import Problem
from vllm.compressed_linear.testing.report import CaseResult, Failure

Tensors = Mapping[str, torch.Tensor]
T = TypeVar("T")


class Run:
    """One case on one backend: runs the backend, compares, and records failures."""

    def __init__(self, backend: type[QuantLinearMethod], problem: Problem) -> None:
        self.backend = backend
        self.problem = problem
        # Parsed from JSON, the descriptor is equal but not identical, as one from a cache.
        self.descriptor = CompressedLinearDescriptor.from_json(problem.descriptor.to_json())
        self.failures: list[Failure] = []
        self.worst = 0.0
        self.checks = 0

    def result(self, declined: tuple[str, ...] = ()) -> CaseResult:
        return CaseResult(
            self.problem.case,
            str(self.problem.descriptor),
            declined,
            tuple(self.failures),
            self.worst,
            0 if declined else self.checks,
        )

    def fail(self, check: str, message: str) -> None:
        self.failures.append(Failure(check, message))

    def attempt(self, check: str, action: Callable[[], T]) -> T | None:
        self.checks += 1
        try:
            return action()
        # A backend may raise any exception, and the remaining checks are still informative.
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = f"{frames[-1].filename}:{frames[-1].lineno}"
            self.fail(check, f"{type(error).__name__}: {error} (at {where})")
            return None

    def prepare(self) -> dict[str, torch.Tensor] | None:
        """Copies of the prepared tensors. The backend's own tensors are overwritten, so references
        that it keeps to them give wrong numbers."""
        stored = [s.tensors for s in self.problem.weights.shards]
        before = [{name: t.clone() for name, t in tensors.items()} for tensors in stored]
        made = self.attempt(
            "prepare",
            lambda: self.backend(self.problem.descriptor).prep_weights_for_execution(
                self.problem.weights
            ),
        )
        if made is None:
            return None
        if not isinstance(made, dict) or not all(
            isinstance(name, str) and type(tensor) is torch.Tensor for name, tensor in made.items()
        ):
            self.fail("prepare", f"returned {shape_of(made)}, expected a dict of plain tensors")
            return None
        if any(not name.isidentifier() for name in made):
            self.fail("prepare", f"tensor names {sorted(made)} must be Python identifiers")
        for old, new in zip(before, stored, strict=True):
            for name, tensor in old.items():
                if not same_bits(tensor, new[name]):
                    self.fail("prepare", f"changed the checkpoint's tensor {name!r}")
        device = self.problem.weight.device
        for name, tensor in made.items():
            if tensor.device != device:
                self.fail("prepare", f"tensor {name!r} is on {tensor.device}, expected {device}")
        promised = self.backend.prepared_bytes(self.problem.descriptor)
        size = sum(tensor.nbytes for tensor in made.values())
        if promised is not None and promised != size:
            self.fail("prepared_bytes", f"says {promised}, the tensors have {size}")
        kept = {name: tensor.clone() for name, tensor in made.items()}
        for tensor in made.values():
            _overwrite(tensor)
        # Repeated preparation (a reload) starts from the same checkpoint.
        for shard, old in zip(self.problem.weights.shards, before, strict=True):
            shard.tensors = old
        return kept

    def apply(
        self, check: str, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Run a new instance; validate shape and dtype, and that no argument was changed."""
        held = {**tensors, "x": x} | ({} if bias is None else {"bias": bias})
        before = {name: tensor.clone() for name, tensor in held.items()}
        out = self.attempt(check, lambda: self.backend(self.descriptor).apply(tensors, x, bias))
        if out is None:
            return None
        shape, dtype = (*x.shape[:-1], self.descriptor.n), torch_dtype(self.descriptor.output_dtype)
        if not isinstance(out, torch.Tensor) or out.shape != shape or out.dtype != dtype:
            self.fail(check, f"gave {shape_of(out)}, expected {dtype} of shape {list(shape)}")
            return None
        for name, tensor in before.items():
            if not same_bits(tensor, held[name]):
                self.fail(check, f"changed {name!r}")
        return out

    def compare(
        self,
        check: str,
        out: torch.Tensor | None,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        rows: slice = slice(None),
    ) -> None:
        """Compare ``out`` [..., N] with the exact result of x [..., K], in the given ``rows``."""
        if out is None or out.numel() == 0:
            return
        x, out = x.reshape(-1, x.shape[-1])[rows], out.reshape(-1, out.shape[-1])[rows]
        expected = self.problem.expected(x, bias)
        self.compare_with(check, out, expected, self.problem.bound(x, expected, self.backend))

    def compare_with(
        self, check: str, out: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor
    ) -> None:
        """Compare ``out`` with the exact result and the largest error, both float64 of its shape
        [rows, columns]."""
        got = out.to(torch.float64)
        largest = torch.finfo(out.dtype).max
        # If the exact result is at the limit of the output's range, infinity is correct, too.
        overflows = (expected.abs() + allowed >= largest) & (got == expected.sign() * math.inf)
        error = torch.where(overflows, 0.0, (got - expected).abs())
        fraction = torch.nan_to_num(error / allowed, nan=math.inf, posinf=math.inf)
        worst = int(fraction.argmax())
        self.worst = max(self.worst, float(fraction.flatten()[worst]))
        if float(fraction.flatten()[worst]) > 1:
            row, column = divmod(worst, out.shape[1])
            self.fail(
                check,
                f"{int((fraction > 1).sum())} of {out.numel()} results are too far off; at "
                f"[{row}, {column}] got {float(got[row, column]):.9g}, exact is "
                f"{float(expected[row, column]):.9g}, off by {float(error[row, column]):.3g}, "
                f"allowed {float(allowed[row, column]):.3g} "
                f"({float(fraction[row, column]):.3g} times)",
            )


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bitwise equality: NaN equals itself, and −0 differs from 0."""
    same_kind = one.shape == two.shape and one.dtype == two.dtype
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return same_kind and torch.equal(one.view(words), two.view(words))


def shape_of(value: object) -> str:
    """Dtype and shape of a result, for messages."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {type(v).__name__}" for k, v in value.items()) + "}"
    return type(value).__name__


def _overwrite(tensor: torch.Tensor) -> None:
    # Expanded tensors share memory and cannot be written in place.
    if tensor.numel() and 0 not in tensor.stride():
        tensor.view(torch.uint8).fill_(0x7F) if tensor.is_contiguous() else tensor.zero_()
