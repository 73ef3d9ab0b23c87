# SPDX-License-Identifier: Apache-2.0
"""Contenders for one layer: what each computes, and how long its calls take, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from benchmarks.machine import cache_bytes
from benchmarks.rotation import may_be_cached
from benchmarks.timing import Timeable, in_turns, summary
from vllm.compressed_linear.testing import Problem

EXACT, LOOSE = 0.02, 0.06
"""Allowed error relative to the largest output: with x as it is, and with x quantized."""

X_AS_IT_IS = "x as it is"
X_QUANTIZED = "x quantized, as the checkpoint says"
X_ROUNDED = "x rounded to 8 bits"
"""What a contender does with x: the last is another contract than the checkpoint's."""

_OUTLIER, _OUTLIERS_APART = 600.0, 32


class Contestant(Timeable, Protocol):
    """What is needed of ``Contender`` and ``RemoteContender``. ``warm_up`` calls it on every copy
    of its weights: some kernels pack them when first used."""

    @property
    def name(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def number_of_copies(self) -> int: ...
    @property
    def tolerance(self) -> float: ...
    def output(self, x: torch.Tensor) -> torch.Tensor: ...
    def warm_up(self, x: torch.Tensor) -> None: ...


def contract_of(contestant: Contestant, problem: Problem) -> str:
    """What it does with x, told by its output: of ones among values of 600 nothing
    is left where x is rounded to 8 bits, by token or by group of 32 channels."""
    if problem.descriptor.activation is not None:
        return X_QUANTIZED
    x = torch.ones_like(problem.activations(1))
    x[:, ::_OUTLIERS_APART] = _OUTLIER
    found = contestant.output(x).double()
    exact = problem.expected(x, None)
    rounded = problem.expected(x.masked_fill(x == 1, 0), None)
    return X_ROUNDED if (found - rounded).norm() < (found - exact).norm() else X_AS_IT_IS


def check(contestant: Contestant, problem: Problem, contract: str = X_AS_IT_IS) -> float:
    """Error relative to the largest output; ``SystemExit`` if it computes something else."""
    x = problem.activations(3)
    expected = problem.expected(x, None)
    error = (contestant.output(x).double() - expected).abs().max() / expected.abs().max()
    tolerance = contestant.tolerance if contract == X_AS_IT_IS else LOOSE
    if not float(error) <= tolerance:
        raise SystemExit(f"{contestant.name}: relative error {error:.3g}, it is another layer")
    return float(error)


def records(contestants: Mapping[str, Contestant], problem: Problem) -> list[dict[str, Any]]:
    """What a result says of each contestant, which is checked and warmed up, without its times."""
    found = []
    together = sum(contestant.weight_bytes for contestant in contestants.values())
    for key, contestant in contestants.items():
        contract = contract_of(contestant, problem)
        error = check(contestant, problem, contract)
        contestant.warm_up(problem.activations(1))
        size, copies = contestant.weight_bytes, contestant.number_of_copies
        found.append(
            {
                "id": key,
                "name": contestant.name,
                "contract": contract,
                "weight_bytes": size,
                "copies": copies,
                "may_be_cached": may_be_cached(copies, size, together - size, cache_bytes()),
                "error": error,
                "rows": [],
            }
        )
    return found


def times_in_turns(
    contestants: Mapping[str, Timeable], x: torch.Tensor, seconds: float
) -> dict[str, dict[str, Any]]:
    """``timing.summary`` of each contestant's calls with ``x``."""
    times = in_turns(list(contestants.values()), x, seconds)
    return {key: summary(seen) for key, seen in zip(contestants, times, strict=True)}


def rates(found: Mapping[str, Any], m: int, weights: int, nbytes: int) -> dict[str, float]:
    """Arithmetic and reading of a call with ``m`` rows that takes ``found["median_ms"]``."""
    seconds = found["median_ms"] / 1e3
    return {
        "gflop_per_s": 2 * m * weights / seconds / 1e9,
        "weight_gb_per_s": nbytes / seconds / 1e9,
    }


def without_fixed(median_ms: float, fixed_ms: float, nbytes: int, fixed_bytes: int) -> float | None:
    """GB/s of packed weights without what a call costs at 16 output channels, ``fixed_ms`` and
    ``fixed_bytes``; None where the difference is lost in the noise."""
    seconds = (median_ms - fixed_ms) / 1e3
    return (nbytes - fixed_bytes) / seconds / 1e9 if seconds > 0 else None
