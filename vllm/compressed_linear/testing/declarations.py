# SPDX-License-Identifier: Apache-2.0
"""Checks of what a backend declares: support of platforms, estimated times, code path."""

from __future__ import annotations

import functools
import math

from vllm.compressed_linear.machine.cost import mix
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.testing.run import Run


def check_other_platforms(run: Run) -> None:
    """``can_implement`` answers for every platform, as ``explain`` asks about absent machines."""
    descriptor = run.problem.descriptor
    for name in ("cpu:generic", "cpu:amx", "cuda:75", "cuda:90"):
        platform = Platform.parse(name)
        verdict = run.attempt(
            f"can_implement on {name}",
            functools.partial(run.backend.can_implement, descriptor, platform),
        )
        if verdict:
            check_estimates(run, platform)


def check_estimates(run: Run, platform: Platform) -> None:
    """``seconds`` for every M of the cost model's mix, and ``variant``."""
    descriptor = run.problem.descriptor

    def seconds() -> list[float]:
        return [run.backend.seconds(descriptor, platform, m) for m in mix(platform.device)]

    first, second = run.attempt("seconds", seconds), run.attempt("seconds", seconds)
    if first is not None and not all(math.isfinite(s) and s >= 0 for s in first):
        run.fail("seconds", f"are {first}, expected finite numbers of at least 0")
    elif first != second:
        run.fail("seconds", "asked twice, gave two answers")
    variant = run.attempt("variant", lambda: run.backend.variant(run.problem.descriptor, platform))
    if variant is not None and not isinstance(variant, str):
        run.fail("variant", f"is {variant!r}, expected a string")
