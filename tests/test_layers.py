# SPDX-License-Identifier: Apache-2.0
"""The layer rule of the package holds, and a breach of it is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import ROOT

TOOLS = ROOT / ".venv" / "lint-tools"


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", "scripts/lint_imports.py", str(TOOLS), str(tree)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, in the directory that stands for its repository."""
    package = Path("vllm", "compressed_linear")
    shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("lib"))
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line", "named"),
    [
        ("formats/awq.py", "import vllm.compressed_linear.backends.registry", "backends.registry"),
        ("backends/cpu/int8.py", "import vllm.compressed_linear.formats.awq", "formats.awq"),
        ("spec/packing.py", "import vllm.compressed_linear.machine.cost", "machine.cost"),
        ("prepare/plan.py", "import vllm.compressed_linear.testing.oracle", "testing.oracle"),
        # Circles inside of a layer; an import in a function is one as well.
        (
            "formats/base.py",
            "import vllm.compressed_linear.formats.compressed_tensors",
            "No cycles are allowed in vllm.compressed_linear.formats",
        ),
        (
            "backends/cpu/packing.py",
            "def late() -> None:\n    import vllm.compressed_linear.backends.cpu.int8",
            "No cycles are allowed in vllm.compressed_linear.backends.cpu",
        ),
        ("prepare/layer.py", "from vllm.config import ModelConfig", "prepare.layer -> vllm.config"),
    ],
)
def test_a_forbidden_import_is_found(copy: Path, module: str, line: str, named: str) -> None:
    file = copy / "vllm" / "compressed_linear" / module
    file.write_text(file.read_text() + f"\n{line}\n")
    found = lint(copy)
    assert found.returncode == 1
    assert named in " ".join(found.stdout.split())


def test_a_folder_outside_of_the_rule_is_found(copy: Path) -> None:
    """The contract is exhaustive: a new folder or a module at the root has to be given a layer."""
    (copy / "vllm" / "compressed_linear" / "odds_and_ends.py").write_text("")
    found = lint(copy)
    assert found.returncode == 1
    assert "odds_and_ends" in found.stdout


def test_the_package_keeps_the_rule(copy: Path) -> None:
    found = lint(copy)
    assert found.returncode == 0, found.stdout
