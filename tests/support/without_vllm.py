# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: the tests that need no vLLM, in a process that does not import it.

``python -m pytest -p tests.support.without_vllm`` runs the tests marked ``unit`` (see ``UNIT``) on
a stand-in for the package ``vllm`` that has nothing but a path to the subpackage of this
repository. Any other import from vLLM fails there, and the 3 seconds it takes are saved.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

from tests.support.repository import ROOT

PARENT, PACKAGE = "vllm", "vllm.compressed_linear"


def install() -> None:
    """Put the stand-in and ``vllm.compressed_linear`` into ``sys.modules``."""
    if PARENT in sys.modules:
        raise RuntimeError("vLLM is imported already; load this plugin with -p")
    stub = types.ModuleType(PARENT, "A stand-in: the path to vllm.compressed_linear.")
    stub.__path__ = [str(ROOT / PARENT)]
    sys.modules[PARENT] = stub
    # Not by a plain import: the finder of the installed package answers only beside a real vLLM.
    spec = importlib.machinery.PathFinder.find_spec(PACKAGE, stub.__path__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    stub.compressed_linear = module  # type: ignore[attr-defined]
    spec.loader.exec_module(module)


install()
