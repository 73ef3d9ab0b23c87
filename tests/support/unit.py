# SPDX-License-Identifier: Apache-2.0
"""Which tests are unit tests: those that neither need vLLM nor start another process of it."""

from __future__ import annotations

from pathlib import Path

from tests.support.repository import ROOT

TESTS = ROOT / "tests"
UNIT = (
    "spec",
    "machine",
    "checkpoint",
    "backends/test_choice.py",
    "backends/test_measurements.py",
    "backends/test_registry.py",
    "backends/cpu",
    "backends/triton/test_backend.py",
    "formats",
    "prepare",
    "testing",
    "test_imports.py",
    "test_messages.py",
    "test_settings.py",
)
"""Folders and files of unit tests. A single test in them that needs vLLM is marked so."""

EXCEPT = (
    # These load whole models.
    "formats/test_old_checkpoints.py",
    "prepare/cache/test_models.py",
    "prepare/test_self_check.py",
    # These take a minute or more.
    "testing/test_conformance.py",
    "testing/test_features.py",
    "testing/test_wrong_backends.py",
)
"""Files in those folders that are no unit tests."""


def is_unit(file: Path) -> bool:
    """Whether the tests in ``file`` are unit tests, as far as no marker says otherwise."""
    if not file.is_relative_to(TESTS):
        return False
    name = file.relative_to(TESTS).as_posix()
    return name not in EXCEPT and any(name == u or name.startswith(f"{u}/") for u in UNIT)
