# SPDX-License-Identifier: Apache-2.0
"""Names of vLLM that the package uses, read from its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

OWN = "vllm.compressed_linear"


def imported_names(package: Path) -> Iterator[tuple[str, str, str]]:
    """(module of vLLM, name in it or "", file) of every import of vLLM in ``package``."""
    for file in sorted(package.rglob("*.py")):
        where = str(file.relative_to(package))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and _is_vllms(node.module or ""):
                for alias in node.names:
                    yield str(node.module), alias.name, where
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if _is_vllms(alias.name):
                        yield alias.name, "", where


def _is_vllms(module: str) -> bool:
    inside = module == "vllm" or module.startswith("vllm.")
    return inside and module != OWN and not module.startswith(f"{OWN}.")


def probed_names(package: Path) -> Iterator[tuple[str, str]]:
    """(attribute, file) of every ``getattr(x, "name", default)`` and ``hasattr(x, "name")`` in
    files that import vLLM: nothing else would tell that such a name is gone."""
    with_vllm = {file for _, _, file in imported_names(package)}
    for where in sorted(with_vllm):
        for node in ast.walk(ast.parse((package / where).read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            probes = (node.func.id, len(node.args)) in {("getattr", 3), ("hasattr", 2)}
            if probes and isinstance(node.args[1], ast.Constant):
                yield str(node.args[1].value), where
