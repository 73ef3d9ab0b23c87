# SPDX-License-Identifier: Apache-2.0
"""Conformance check of a backend over cases.

The expected result is computed in float64 from the stored numbers; the largest error is that of the
backend's numerical contract, never a tolerance of the kit.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import torch

from vllm.compressed_linear.backends.base import QuantLinearMethod, Verdict
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.testing.declarations import check_estimates, check_other_platforms
from vllm.compressed_linear.testing.graphs import (
    check_compiled,
    check_compiled_lookup,
    check_cuda_graph,
)
from vllm.compressed_linear.testing.lookups import check_lookup
from vllm.compressed_linear.testing.oracle import Case
from vllm.compressed_linear.testing.products import (
    ROWS,
    check_batch_sizes,
    check_forms,
    check_invariance,
    check_isolation,
)
from vllm.compressed_linear.testing.report import CaseResult, Report
from vllm.compressed_linear.testing.run import Run
from vllm.compressed_linear.testing.suite import conformance_cases


def check_backend(
    backend: type[QuantLinearMethod],
    platform: Platform | None = None,
    cases: Iterable[Case] | None = None,
    *,
    rows: Iterable[int] = ROWS,
    compiled: bool = True,
    device: str | None = None,
) -> Report:
    """Run ``backend`` over ``cases`` (default: all of ``conformance_cases``) on ``platform``.

    ``platform``: argument of ``can_implement`` (default: this machine); the tensors are on its
    device, or on ``device``, for kernels that are emulated there. ``rows``: the batch sizes M.
    ``compiled``: also run one case of each kind of element under torch.compile. Failures are in the
    report (``Report.raise_if_failed``); raises ``ValueError`` only if the platform's device is
    absent.
    """
    platform = platform or Platform.detect()
    rows, results = tuple(rows), []
    traced: set[tuple[str, bool, bool]] = set()
    for case in conformance_cases() if cases is None else cases:
        kind = (case.element.kind, case.bias_dtype is not None, case.activation is not None)
        result = check_case(
            backend,
            case,
            platform,
            rows=rows,
            compiled=compiled and kind not in traced,
            device=device,
        )
        if result.outcome != "declined":
            traced.add(kind)
        results.append(result)
    return Report(getattr(backend, "name", backend.__name__), platform.name, tuple(results))


def check_case(
    backend: type[QuantLinearMethod],
    case: Case,
    platform: Platform | None = None,
    *,
    rows: Iterable[int] = ROWS,
    compiled: bool = False,
    device: str | None = None,
) -> CaseResult:
    """Run ``backend`` over one case; see ``check_backend``."""
    platform = platform or Platform.detect()
    problem = case.build(device or _device(platform))
    descriptor = problem.descriptor
    run = Run(backend, problem)
    verdict = run.attempt("can_implement", lambda: backend.can_implement(descriptor, platform))
    if not isinstance(verdict, Verdict):
        run.fail("can_implement", f"gave {verdict!r}, expected a Verdict")
        return run.result()
    check_other_platforms(run)
    if not verdict:
        if not all(isinstance(r, str) and r.strip() for r in verdict.reasons):
            run.fail("can_implement", f"declined without saying why: {verdict.reasons!r}")
        return run.result(declined=tuple(verdict.reasons))
    if backend.can_implement(descriptor, platform) != verdict:
        run.fail("can_implement", "asked twice, gave two answers")
    check_estimates(run, platform)
    with _poisoned_memory():
        tensors = run.prepare()
        if tensors is not None:
            check_batch_sizes(run, tensors, tuple(rows))
            check_forms(run, tensors)
            activation = descriptor.activation
            if activation is None or not activation.mixes_rows:
                check_isolation(run, tensors)
                if backend.rows_are_independent(descriptor, platform):
                    check_invariance(run, tensors)
            looks_up = check_lookup(run, tensors, platform)
            if problem.weight.is_cuda:
                check_cuda_graph(run, tensors)
    if tensors is not None and compiled and not run.failures:
        check_compiled(run, tensors)
        if looks_up:
            check_compiled_lookup(run, tensors)
    return run.result()


def _device(platform: Platform) -> str:
    """The torch device of ``platform``; ``ValueError`` if this machine has none."""
    name = "cuda" if platform.device == "rocm" else platform.device
    if name != "cpu" and not getattr(torch, name).is_available():
        raise ValueError(f"platform {platform.name} cannot be tested here: no {name} device")
    return name


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Let ``torch.empty`` return NaN and the largest integers, so that uninitialized reads show."""
    mode = torch.get_deterministic_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
