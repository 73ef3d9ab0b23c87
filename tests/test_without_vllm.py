# SPDX-License-Identifier: Apache-2.0
"""The lower layers of the package, and the unit tests, run in a process without vLLM."""

from __future__ import annotations

import subprocess
import sys

from tests.support.repository import ROOT, environment

WITHOUT_VLLM = ("spec", "machine", "checkpoint", "formats", "backends", "prepare", "testing")
"""Folders of the package whose modules import nothing of vLLM when they are imported."""


def python(*arguments: str) -> str:
    """What a new process says, which must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


IMPORT_ALL = """
import importlib, pkgutil, sys
from tests.support import without_vllm
for folder in sys.argv[1:]:
    package = importlib.import_module(f"vllm.compressed_linear.{folder}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
print(len([name for name in sys.modules if name.startswith("vllm.compressed_linear.")]))
print(without_vllm.others())
"""


def test_the_lower_layers_import_nothing_of_vllm() -> None:
    count, others = python("-c", IMPORT_ALL, *WITHOUT_VLLM).splitlines()[-2:]
    assert int(count) > 50
    assert others == "[]"


def test_an_import_from_vllm_is_found() -> None:
    program = (
        "import sys, types\n"
        "from tests.support import without_vllm\n"
        "try:\n"
        "    import vllm.config\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error.name)\n"
        "sys.modules['vllm.config'] = types.ModuleType('vllm.config')\n"
        "print(without_vllm.others())\n"
    )
    assert python("-c", program).split() == ["vllm.config", "['vllm.config']"]


def test_unit_tests_are_collected_without_vllm() -> None:
    """Also those that share a file with tests that need vLLM."""
    command = ["-m", "pytest", "-p", "tests.support.without_vllm", "-p", "no:cacheprovider"]
    found = python(*command, "--collect-only", "-q", "-m", "unit").splitlines()
    names = [line for line in found if "::" in line]
    assert len(names) > 1000
    assert {name.split("/")[1] for name in names} >= {"spec", "machine", "checkpoint", "prepare"}
    assert not any("/integration/" in name for name in names)
