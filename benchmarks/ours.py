# SPDX-License-Identifier: Apache-2.0
"""Our backends as contenders: whatever the registry says can compute a descriptor, by name."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks.contender import Contender, Tensors, nbytes
from benchmarks.schemes import Scheme
from benchmarks.timing import Elapsed, in_turns, timed
from vllm.compressed_linear.backends import registry
from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.testing import Problem

NOT_OURS = ("reference", "vllm_native")
"""Backends that are no kernels of this package."""

CACHED_K = 1024
CACHED_N = (128, 384)
"""Two sizes that fit the second-level cache with any element; see ``cached_rate``."""


def able(problem: Problem) -> tuple[dict[str, str], dict[str, str]]:
    """Our backends that can compute ``problem`` with the code path each would take, and why the
    others cannot."""
    can, cannot = {}, {}
    for candidate in registry.rank(problem.descriptor, Platform.detect()):
        if candidate.name in NOT_OURS:
            continue
        if candidate.verdict:
            can[candidate.name] = candidate.variant
        else:
            cannot[candidate.name] = str(candidate.verdict)
    return can, cannot


def _applied(
    backend: QuantLinearMethod,
) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    return lambda x, tensors: backend.apply(tensors, x)


def contender(problem: Problem, name: str, variant: str) -> Contender:
    """Backend ``name``, which can compute ``problem``."""
    backend = registry.backends()[name].backend(problem.descriptor)
    return Contender.prepared(
        f"ours, {name}" + (f" ({variant})" if variant else ""),
        _applied(backend),
        lambda: backend.prep_weights_for_execution(problem.weights),
        # Quantized activations are checked by the conformance kit; here only against a mix-up.
        tolerance=0.02 if problem.descriptor.activation is None else 0.06,
    )


def cached_rate(scheme: Scheme, name: str, seconds: float) -> float:
    """GB/s of packed weights that the kernel decodes for one token when they lie in the caches.

    The difference between two layers of unlike N and the same K, so that what a call costs apart
    from its weights does not count.
    """
    layers = []
    for n in CACHED_N:
        problem = scheme.problem(n, CACHED_K)
        backend = registry.backends()[name].backend(problem.descriptor)
        tensors = backend.prep_weights_for_execution(problem.weights)
        layers.append(Contender(name, _applied(backend), (tensors,)))
    x = problem.activations(1)
    small, large = (
        statistics.median(t.counted for t in times)
        for times in in_turns([_Burst(layer) for layer in layers], x, seconds, rounds=30)
    )
    difference = nbytes(layers[1].copies[0]) - nbytes(layers[0].copies[0])
    return _Burst.CALLS * difference / (large - small) / 1e9


class _Burst:
    """Many calls as one: a single one is too short for the clock."""

    CALLS = 200

    def __init__(self, layer: Contender) -> None:
        self.layer = layer

    def warm_up(self, x: torch.Tensor) -> None:
        self.layer.warm_up(x)

    def turn(self, x: torch.Tensor, first: int) -> list[Elapsed]:
        tensors = self.layer.copies[0]

        def burst() -> None:
            for _ in range(self.CALLS):
                self.layer.call(x, tensors)

        burst()
        return [timed(burst)]
