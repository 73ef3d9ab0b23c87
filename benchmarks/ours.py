# SPDX-License-Identifier: Apache-2.0
"""Our backends as contenders: whatever the registry says can compute a descriptor, by name."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.contender import Contender, Tensors, nbytes
from benchmarks.schemes import Scheme
from benchmarks.timing import SHORT_CALLS_PER_TURN, Elapsed, in_turns, timed
from vllm.compressed_linear.backends import registry
from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.layer import choose
from vllm.compressed_linear.settings import Settings
from vllm.compressed_linear.testing import Problem

NOT_OURS = ("reference", "vllm_native")
"""Backends that are no kernels of this package; ``chosen`` may take them all the same."""

CACHED_K = 1024
CACHED_N = (128, 384)
"""Two sizes that fit the second-level cache with any element; see ``cached_rate``."""


def able(problem: Problem) -> tuple[list[str], dict[str, str]]:
    """Our backends that can compute ``problem``, the preferred one first, and why the others
    cannot."""
    candidates = registry.rank(problem.descriptor, Platform.detect())
    own = [candidate for candidate in candidates if candidate.name not in NOT_OURS]
    cannot = {c.name: str(c.verdict) for c in own if not c.verdict}
    return [c.name for c in own if c.verdict], cannot


def _applied(
    backend: QuantLinearMethod,
) -> Callable[[torch.Tensor, Tensors], torch.Tensor]:
    return lambda x, tensors: backend.apply(tensors, x)


def contender(problem: Problem, name: str) -> Contender:
    """Backend ``name``, which can compute ``problem``."""
    return _contender(problem, registry.backends()[name].backend(problem.descriptor))


def chosen(problem: Problem) -> Contender:
    """The backend that a load would choose on this machine, which may be one of vLLM's kernels."""
    selection = _selection(problem)
    backend = selection.chosen(problem.descriptor)
    return _contender(problem, backend, selection.variant if backend.name in NOT_OURS else "")


def choice(problem: Problem) -> str:
    """Name of the backend that a load would choose on this machine."""
    return _selection(problem).chosen.name


def _selection(problem: Problem) -> registry.Selection:
    return choose("", problem.descriptor, Platform.detect(), Settings.read())


def _contender(problem: Problem, backend: QuantLinearMethod, variant: str = "") -> Contender:
    return Contender.prepared(
        f"ours, {backend.name}" + (f" ({variant})" if variant else ""),
        _applied(backend),
        lambda: backend.prep_weights_for_execution(problem.weights),
        # Quantized activations are checked by the conformance kit; here only against a mix-up.
        tolerance=0.02 if problem.descriptor.activation is None else 0.06,
    )


def kernel_of(contender: Contender, x: torch.Tensor) -> str:
    """The native kernels that ran for ``x``, for example ``planes/avx512``: layout of the weights
    and instruction set. Empty if none of this package's did."""
    native.reset_call_counts()
    contender.output(x)
    return kernels(native.call_counts())


def kernels(counts: Mapping[str, int]) -> str:
    """The kernels of ``native.call_counts()``, without what is not a product."""
    found = (name.split("/") for name, count in counts.items() if count)
    return ", ".join(sorted({"/".join(parts[1:3]) for parts in found if parts[0] == "linear"}))


class Fixed:
    """What a call costs apart from its weights: the same op with 16 output channels, after each
    call of the whole layer, which leaves caches and TLBs as a model's other layers do."""

    N = native.TILE

    def __init__(self, scheme: Scheme, name: str, whole: Contender, k: int) -> None:
        self.whole = whole
        problem = scheme.problem(self.N, k)
        backend = registry.backends()[name].backend(problem.descriptor)
        self.small = Contender(
            name,
            _applied(backend),
            tuple(backend.prep_weights_for_execution(problem.weights) for _ in whole.copies),
        )

    @property
    def weight_bytes(self) -> int:
        """Packed bytes of the 16 output channels."""
        return self.small.weight_bytes

    def turn(self, x: torch.Tensor, first: int) -> list[Elapsed]:
        """Times of a few calls with 16 output channels."""
        times = []
        for i in range(first, first + SHORT_CALLS_PER_TURN):
            copy = i % len(self.whole.copies)
            self.whole.call(x, self.whole.copies[copy])
            times.append(timed(partial(self.small.call, x, self.small.copies[copy])))
        return times


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

    def turn(self, x: torch.Tensor, first: int) -> list[Elapsed]:
        tensors = self.layer.copies[0]

        def burst() -> None:
            for _ in range(self.CALLS):
                self.layer.call(x, tensors)

        burst()
        return [timed(burst)]
