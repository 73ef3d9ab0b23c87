# SPDX-License-Identifier: Apache-2.0
"""Tests share code through ``tests.support`` only: no test imports another test or a conftest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.repository import ROOT

TESTS = ROOT / "tests"
SUPPORT = {"tests.support"} | {
    ".".join(file.relative_to(TESTS.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in (TESTS / "support").rglob("*.py")
}


def imported(source: str) -> Iterator[str]:
    """Every module that is imported anywhere in a file, and for ``from`` each name as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}:{alias.name}" for alias in node.names)


def forbidden(source: str) -> list[str]:
    """Imports that reach a test, a conftest, or a helper by another name than ``tests.support``."""
    helpers = {file.stem for file in TESTS.rglob("*.py")} - {"__init__"}
    found = []
    for name in imported(source):
        module, _, member = name.partition(":")
        ours = module.startswith(".") or module.split(".")[0] in helpers | {"tests"}
        shared = module in SUPPORT - {"tests.support"} or f"{module}.{member}" in SUPPORT
        if ours and not shared:
            found.append(name)
    return found


@pytest.mark.parametrize(
    "file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS))
)
def test_shared_code_comes_from_support(file: Path) -> None:
    assert forbidden(file.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from conftest import checkpoint",
        "import conftest",
        "from tests import test_settings",
        "from tests.conftest import isa",
        "import tests.machine.test_cost",
        "from tests.machine.test_cost import SHAPES",
        "from test_settings import BACKEND",
        "from synthetic import Model",
        "from . import strategies",
        "from .strategies import weights",
        "def test() -> None:\n    from tests.spec import test_packing",
    ],
)
def test_other_imports_are_found(line: str) -> None:
    assert forbidden(line)


@pytest.mark.parametrize(
    "line",
    [
        "from tests.support import strategies",
        "from tests.support.strategies import weights",
        "import tests.support.strategies",
        "from vllm.compressed_linear.testing import Case",
    ],
)
def test_shared_modules_and_the_package_are_allowed(line: str) -> None:
    assert forbidden(line) == []
