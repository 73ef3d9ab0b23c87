# SPDX-License-Identifier: Apache-2.0
"""Measure the time of a checkpoint's layers on each backend of this machine.

Descriptors equal those of a load, so the small tensors of the checkpoint are read; codes are not,
the timed weights are random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from vllm.compressed_linear.backends import measurements as tune_file
from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.backends.measurements import (
    MachineKey,
    Measured,
    Measurements,
)
from vllm.compressed_linear.backends.registry import REFERENCE, Candidate, backends, rank
from vllm.compressed_linear.checkpoint.completeness import Severity
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.explain.explanation import LayerPlan
from vllm.compressed_linear.commands.explain.findings import About
from vllm.compressed_linear.commands.tune.random_weights import random_weights
from vllm.compressed_linear.machine import timing
from vllm.compressed_linear.machine.cost import mix
from vllm.compressed_linear.machine.limits import MachineLimits, cache_bytes
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.self_check import self_check
from vllm.compressed_linear.settings import Settings
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype

CACHE_MULTIPLE = 3
"""Size of all weights of one backend, in units of the last-level caches, so that every call misses
them. Larger layers are cut along N: more rows would add no information."""

ROW_UNIT = 256
"""Output channels are cut to a multiple of this for each thread."""

HUGE_PAGE = 2 << 20
"""Copies of smaller weights are cloned; larger ones are prepared again, since the placement of
their pages affects the time."""


GPU_MATRIX = 8192
"""Rows and columns of the matrices for measuring a GPU's arithmetic."""

CALLS_IN_GRAPH = 64
LARGE_BATCH = 512
"""From this M on, a call on a GPU takes long enough to time a few together."""


class TuneError(ValueError):
    """The requested measurement is impossible."""


@dataclass(frozen=True)
class LayerResult:
    """One descriptor: its ``layers``; ``candidates`` as serving would rank them now, best first;
    ``estimate``: the choice of the cost model alone."""

    descriptor: CompressedLinearDescriptor
    layers: tuple[str, ...]
    measured: Mapping[str, Measured]
    candidates: tuple[Candidate, ...]
    estimate: str

    @property
    def chosen(self) -> str:
        return self.candidates[0].name


@dataclass
class TuneResult:
    """Results of one run; ``failures``: one line each."""

    key: MachineKey
    measurements: Measurements = field(default_factory=Measurements)
    layers: list[LayerResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Progress(Protocol):
    """Receives the current measurement, and how many M of how many descriptors are done."""

    def __call__(self, text: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Measuring:
    """Parameters of the measurement. ``budget``: seconds for all candidates of one descriptor and
    M; ``cache_bytes``: the last-level caches of the machine; ``now``: the clock; ``device``: "cpu"
    or "cuda", where graphs of several calls are replayed, so that a synchronizing clock
    suffices."""

    budget: float
    cache_bytes: int
    now: timing.Clock
    matrix: int = GPU_MATRIX
    device: str = "cpu"

    @classmethod
    def of(cls, platform: Platform, budget: float) -> Measuring:
        """Parameters for ``platform``, which must be this machine."""
        if platform.device == "cpu":
            return cls(budget, cache_bytes(platform.threads), timing.clock(platform.threads))
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        clock = timing.device_clock()
        return cls(budget, properties.L2_cache_size, clock, device=platform.device)

    @property
    def rotated_bytes(self) -> int:
        """Bytes of weights that exceed the caches."""
        return CACHE_MULTIPLE * self.cache_bytes

    def limits(self, declared: MachineLimits) -> MachineLimits:
        """Measured limits with the threads in use; ``declared`` ones if there is no measurement. A
        CPU's rates of multiplying follow from those of its instructions, which were measured when
        its profile was chosen; torch's products would measure torch."""
        given = {"seconds": self.budget, "now": self.now, "device": self.device}
        read = timing.read_rate(self.rotated_bytes, **given)  # type: ignore[arg-type]
        found = replace(declared, read=_digits(read))
        if self.device == "cpu":
            return found
        rates = timing.multiply_rates(self.matrix, **given)  # type: ignore[arg-type]
        return replace(found, **{name: _digits(rate) for name, rate in rates.items()})

    def repeats(self, m: int) -> int:
        """Calls with ``m`` tokens that are timed as one."""
        if self.device == "cpu":
            return 1
        return CALLS_IN_GRAPH if m < LARGE_BATCH else 1 + CALLS_IN_GRAPH // 16

    def timeable(self, call: Callable[[int], object], m: int) -> Callable[[int], object]:
        """``repeats`` of ``call``, timed as one."""
        if self.device == "cpu":
            return call
        graph = timing.captured(call, self.repeats(m))
        return lambda number: graph.replay()


def tune(
    model: str,
    *,
    platform: Platform,
    output: Path,
    measuring: Measuring,
    tp_size: int = 1,
    dtype: str = "auto",
    only: Sequence[str] = (),
    progress: Progress = lambda text, done, total: None,
) -> TuneResult:
    """Measure the layers of a local checkpoint and add the results to ``output``, after each layer,
    so that an interrupted run keeps its results.

    ``only``: names of the backends to measure; all of them if empty. Raises the errors of
    ``explain``, ``TuneError``, and ``TuneFileError`` if ``output`` is not a tune file.
    """
    key = MachineKey.of(platform)
    if key is None:
        raise TuneError(f"only this machine's CPU or GPU can be tuned, not {platform.name}")
    if unknown := sorted(set(only) - set(backends())):
        raise TuneError(f"no backend {unknown[0]!r} (registered: {', '.join(backends())})")
    if output.exists():
        tune_file.read(output)
    found = explain(
        model,
        platform=platform,
        tp_size=tp_size,
        dtype=dtype,
        read_weights=True,
        settings=Settings(),
    )
    damage = [
        finding.message
        for finding in found.findings
        if finding.severity is Severity.ERROR and finding.about is About.CHECKPOINT
    ]
    if damage:
        raise TuneError(damage[0])
    wanted = descriptors(found.layers)
    if not wanted:
        raise TuneError(f"{model} has no layer that this package runs: {'; '.join(found.notes)}")
    result = TuneResult(key)
    sizes = mix(platform.device)
    total = len(wanted) * len(sizes)
    with _threads(platform.threads):
        progress("limits of the machine", 0, total)
        result.measurements.limits = measuring.limits(platform.limits)
        for number, (descriptor, layers) in enumerate(wanted.items()):
            able = candidates(descriptor, platform, only)
            if not able:
                result.failures.append(f"{layers[0]} ({descriptor}): no backend to measure")
                continue
            say = partial(_tell, progress, str(descriptor), number * len(sizes), total)
            measured = measure_descriptor(descriptor, able, measuring, say)
            result.measurements.layers[descriptor] = measured
            tune_file.merge(output, key, result.measurements)
            result.layers.append(_result(descriptor, layers, measured, platform, output, key))
    return result


def _tell(progress: Progress, text: str, before: int, total: int, done: int) -> None:
    progress(text, before + done, total)


def _result(
    descriptor: CompressedLinearDescriptor,
    layers: Sequence[str],
    measured: Mapping[str, Measured],
    platform: Platform,
    output: Path,
    key: MachineKey,
) -> LayerResult:
    ranked = rank(descriptor, platform, tune_file.read(output)[key])
    able = tuple(candidate for candidate in ranked if candidate.verdict)
    return LayerResult(
        descriptor, tuple(layers), measured, able, rank(descriptor, platform)[0].name
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def descriptors(layers: Sequence[LayerPlan]) -> dict[CompressedLinearDescriptor, list[str]]:
    """Every distinct descriptor of any rank → the layers that have it."""
    found: dict[CompressedLinearDescriptor, list[str]] = {}
    for layer in layers:
        for case in (layer.likely, *(cases[0] for _, cases in layer.other_ranks)):
            for part in case.parts:
                names = found.setdefault(part.descriptor, [])
                if layer.name not in names:
                    names.append(layer.name)
    return {d: names for d, names in found.items() if d.n and d.k}


def candidates(
    descriptor: CompressedLinearDescriptor, platform: Platform, only: Sequence[str] = ()
) -> list[Candidate]:
    """Backends to measure: all that can run it, but ``reference`` only if it is the only one or
    was named."""
    able = [
        c
        for c in rank(descriptor, platform)
        if c.verdict and (c.name in only if only else not c.only_if_named)
    ]
    if only or len(able) == 1:
        return able
    return [candidate for candidate in able if candidate.name != REFERENCE]


def measured_rows(descriptor: CompressedLinearDescriptor, enough: int, threads: int) -> int:
    """Output channels that are measured: all, or as many as take ``enough`` bytes."""
    row_bytes = descriptor.k * descriptor.weight.element.bits / 8
    unit = ROW_UNIT * threads
    return min(descriptor.n, math.ceil(enough / row_bytes / unit) * unit)


def _digits(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


class _Contender:
    """A backend with enough copies of a layer's weights to exceed the caches."""

    def __init__(
        self,
        backend: type[QuantLinearMethod],
        descriptor: CompressedLinearDescriptor,
        bias: torch.Tensor | None,
        enough: int,
        device: str,
    ) -> None:
        self.method = backend(descriptor)
        self.bias = bias
        weights = random_weights(descriptor, device)
        first = self.method.prep_weights_for_execution(weights)
        self_check("random weights", self.method, first, weights)
        size = max(sum(t.nbytes for t in first.values()), 1)
        self.copies = [first]
        for _ in range(math.ceil(enough / size) - 1):
            self.copies.append(
                {name: tensor.clone() for name, tensor in first.items()}
                if size < HUGE_PAGE
                else self.method.prep_weights_for_execution(weights)
            )

    def __call__(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return self.method.apply(self.copies[number % len(self.copies)], x, self.bias)


def measure_descriptor(
    descriptor: CompressedLinearDescriptor,
    able: Sequence[Candidate],
    measuring: Measuring,
    say: Callable[[int], None] = lambda done: None,
) -> dict[str, Measured]:
    """Time each of ``able`` with every M of the device's mix, on the threads torch has.

    Raises ``SelfCheckError`` if one of them computes wrong numbers.
    """
    device, sizes = measuring.device, mix(measuring.device)
    rows = descriptor.n
    if device == "cpu":
        rows = measured_rows(descriptor, measuring.rotated_bytes, torch.get_num_threads())
    cut = replace(descriptor, out_features=rows)
    bias = None
    if descriptor.bias_dtype is not None:
        bias = torch.randn(rows).to(device, torch_dtype(descriptor.bias_dtype))
    contenders = [
        _Contender(backends()[c.name].backend, cut, bias, measuring.rotated_bytes, device)
        for c in able
    ]
    seconds: list[dict[int, float]] = [{} for _ in able]
    spread: list[dict[int, float]] = [{} for _ in able]
    with torch.inference_mode():
        for done, m in enumerate(sizes):
            say(done)
            x = torch.randn(m, descriptor.in_features)
            x = x.to(device, torch_dtype(descriptor.input_dtype))
            calls = [measuring.timeable(partial(contender, x), m) for contender in contenders]
            times = timing.measure(calls, budget=measuring.budget, now=measuring.now, seed=m)
            for index, found in enumerate(times):
                seconds[index][m] = _digits(
                    found.median / measuring.repeats(m) * descriptor.n / rows
                )
                spread[index][m] = _digits(found.spread)
    say(len(sizes))
    return {
        candidate.name: Measured(candidate.variant, seconds[index], spread[index])
        for index, candidate in enumerate(able)
    }
