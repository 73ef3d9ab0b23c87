# SPDX-License-Identifier: Apache-2.0
"""The example package: installed as a user would, found, checked by the kit, chosen, and serving
checkpoints of three formats it has never heard of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.checkpoints import checkpoint
from tests.support.repository import ROOT

EXAMPLE = ROOT / "examples" / "third_party_backend"
SELECT = """
from vllm.compressed_linear.backends import registry
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.testing import Case

descriptor = Case(uint(4), zero="integer", order="act").build().descriptor
platform = Platform("cpu")
ranked = [c.name for c in registry.rank(descriptor, platform) if c.verdict]
assert ranked == ["dequantizing", "reference"], ranked
selection = registry.select(descriptor, platform, override="dequantizing")
assert selection.chosen_by == "asked for"
print(f"selected {selection.chosen.__module__}.{selection.chosen.__qualname__}")
"""
SERVE = """
import sys
import torch
from pathlib import Path
from tests.support.checkpoints import checkpoint_reference
from tests.support.model_loading import loaded, logits
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

for path in map(Path, sys.argv[1:]):
    reference = checkpoint_reference(path.name)
    with loaded(path, "float32") as model:
        ours = logits(model, reference["input_ids"])
    error = torch.log_softmax(ours, -1) - torch.log_softmax(reference["logits"], -1)
    ran = {entry.backend for entry in PROCESS_PLAN.entries.values()}
    print("served", path.name, sorted(ran), float(error.abs().max()))
    assert float(error.abs().max()) <= 1e-4
    assert ran == {"dequantizing", "reference"}, ran
"""


def run(command: list[str], **environment: str) -> str:
    """Output of a command that must succeed, run from somewhere else than the repository."""
    done = subprocess.run(
        command,
        cwd="/",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that sees this environment's packages and has the example installed."""
    base = tmp_path_factory.mktemp("third_party")
    run([sys.executable, "-m", "venv", "--without-pip", str(base / "venv")])
    python = str(base / "venv" / "bin" / "python")
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run([python, "-c", purelib]).strip())
    # addsitedir, unlike a plain path, also honours the .pth files that lie there.
    parent = sysconfig.get_path("purelib")
    (site / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    source = shutil.copytree(EXAMPLE, base / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "--no-index", "--no-deps", "--no-build-isolation", str(source)])
    return python


def test_is_at_most_sixty_lines() -> None:
    files = [*EXAMPLE.glob("*.py"), EXAMPLE / "pyproject.toml"]
    assert sum(len(file.read_text().splitlines()) for file in files) <= 60


def test_passes_the_conformance_kit(python: str) -> None:
    command = [python, "-m", "vllm.compressed_linear.testing", "dequantizing"]
    output = run(command, OMP_NUM_THREADS="1", COLUMNS="120")
    assert "dequantizing on cpu" in output
    total = next(line for line in output.splitlines() if line.startswith("│ all "))
    passed, failed = total.split("│")[2:4]
    assert int(passed) > 100
    assert failed.strip() == "·"


def test_is_found_and_selected_and_serves_three_formats(python: str) -> None:
    names = (
        "gptqmodel-gptq-w4-g32-asym-descact",
        "autoawq-awq-gemm-g128-asym",
        "llmcompressor-w3a16-asym-g64",
    )
    output = run(
        [python, "-c", SELECT + SERVE, *(str(checkpoint(name)) for name in names)],
        PYTHONPATH=str(ROOT),
        VLLM_COMPRESSED_LINEAR_BACKEND="dequantizing,unquantized=reference",
    )
    assert "selected dequantizing_linear.DequantizingBackend" in output
    for name in names:
        assert f"served {name} ['dequantizing', 'reference']" in output
