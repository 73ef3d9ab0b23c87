# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm.compressed_linear.testing``: run the conformance kit from a shell."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.backends.registry import backends
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.testing.check import check_backend
from vllm.compressed_linear.testing.oracle import Case
from vllm.compressed_linear.testing.suite import conformance_cases


def find_backend(name: str) -> type[QuantLinearMethod]:
    """A registered backend by its name, or a class as ``module:Class``.

    Raises ``typer.BadParameter`` for an unknown name.
    """
    if ":" not in name:
        known = backends()
        if name not in known:
            raise typer.BadParameter(f"no backend {name!r} (registered: {', '.join(known)})")
        return known[name].backend
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(str(error)) from error
    if not (inspect.isclass(found) and issubclass(found, QuantLinearMethod)):
        raise typer.BadParameter(f"{name} is not a subclass of QuantLinearMethod")
    return found


def of_shape(shape: str) -> list[Case]:
    """The conformance cases as layers of ``shape``, "NxK", without duplicates.

    Raises ``typer.BadParameter`` for an invalid shape.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if match is None:
        raise typer.BadParameter(f"shape {shape!r} (expected NxK, as in 128x256)")
    n, k = int(match[1]), int(match[2])
    return list(dict.fromkeys(replace(c, n=n, k=k, shards=()) for c in conformance_cases()))


def run(
    backend: Annotated[str, typer.Argument(help="a registered name, or module:Class")],
    platform: Annotated[
        str, typer.Option(help="argument of can_implement, e.g. cpu:avx2 or cuda")
    ] = "cpu",
    device: Annotated[
        str | None,
        typer.Option(help="device of the tensors, if a kernel is emulated there, e.g. cpu"),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NxK", help="use this shape instead of each case's, for kernels with few shapes"
        ),
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, help="use only every n-th case, for kernels with long compilation")
    ] = 1,
) -> None:
    """Run a backend over the conformance cases and show declined, passed and failed ones."""
    found = find_backend(backend)
    try:
        cases = conformance_cases() if shape is None else of_shape(shape)
        report = check_backend(found, Platform.parse(platform), cases[::every], device=device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(*report.tables(), sep="\n")
    sys.exit(1 if report.of("failed") else 0)


if __name__ == "__main__":
    typer.run(run)
