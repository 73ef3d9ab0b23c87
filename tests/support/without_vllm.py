# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: unit tests only, in a process without vLLM, whose import takes 3 seconds.

``python -m pytest -p tests.support.without_vllm`` runs what ``tests/support/unit.py`` lists. The
package ``vllm`` is a stand-in there that has nothing but a path, to the subpackage of this
repository; importing anything else of vLLM fails, and that nothing else was imported is checked at
the end. Property tests try fewer examples.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support.repository import ROOT
from tests.support.unit import is_unit

PARENT, PACKAGE = "vllm", "vllm.compressed_linear"


def install() -> None:
    """Put the stand-in and ``vllm.compressed_linear`` into ``sys.modules``."""
    if PARENT in sys.modules:
        raise RuntimeError("vLLM is imported already; load this plugin with -p")
    stub = types.ModuleType(PARENT, "A stand-in: the path to vllm.compressed_linear.")
    stub.__path__ = [str(ROOT / PARENT)]
    sys.modules[PARENT] = stub
    # Not by a plain import: the finder of the installed package answers only for a real vLLM.
    spec = importlib.machinery.PathFinder.find_spec(PACKAGE, stub.__path__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    stub.compressed_linear = module  # type: ignore[attr-defined]
    spec.loader.exec_module(module)


def others() -> list[str]:
    """Modules of vLLM that are loaded and are not ours."""
    ours = (PARENT, PACKAGE)
    return sorted(
        name
        for name in sys.modules
        if name.startswith(f"{PARENT}.") and name not in ours and not name.startswith(f"{PACKAGE}.")
    )


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Other test files are not even imported: many import vLLM."""
    return not is_unit(collection_path) if collection_path.suffix == ".py" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Single tests that need vLLM are left out."""
    left_out = [item for item in items if item.get_closest_marker("needs_vllm")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_sessionstart() -> None:
    settings.load_profile("quick")
    # For small tensors more threads only wait for one another, for long where others compute too.
    torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if found := others():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nunit tests imported {', '.join(found)}", file=sys.stderr)


install()
