# SPDX-License-Identifier: Apache-2.0
"""Each statement of the security page has a test, and the test exists."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.repository import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| (?!Statement|---)", line)]
TESTS = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


@pytest.mark.parametrize("row", ROWS)
def test_every_statement_names_its_test(row: str) -> None:
    assert re.search(r"\| `tests/[\w/]+\.py::\w+` \|$", row)


@pytest.mark.parametrize(("file", "name"), sorted(set(TESTS)))
def test_every_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_is_a_statement_with_a_test() -> None:
    """Only the last section, which promises nothing, has prose."""
    promises = PAGE.partition("## What a checkpoint can do")[0].partition("## What")[2]
    prose = [
        line
        for line in promises.splitlines()
        if line and not line.startswith(("|", "#", "[Prepared")) and "cannot do" not in line
    ]
    assert prose == []
    assert len(ROWS) >= 25
