# SPDX-License-Identifier: Apache-2.0
"""The release of vLLM that GPUs have and CPUs do not, on its real Python sources.

The sources come from its wheel, the operators from the installed CPU build
(``scripts/vllm_sources.py``). ``VLLM_NEXT`` names another release.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.asked_configs import unknown_places
from tests.support.repository import ROOT, environment
from tests.support.vllm_names import imported_names, probed_names

NEXT = os.environ.get("VLLM_NEXT", "0.33.0")
PACKAGE = ROOT / "vllm" / "compressed_linear"
SUITE = (
    "tests/backends/vllm_native",
    "tests/commands/explain",
    "tests/integration",
)
"""What meets vLLM in this process."""

OTHERS = {"__file__", "compressed_linear", "_fields", "is_meta", "weight_loader"}
"""Probed names that are Python's, torch's or ours."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources() -> Path:
    """Directory of the sources, kept in build/ for the next run."""
    target = ROOT / "build" / f"vllm-{NEXT}"
    script = [sys.executable, str(ROOT / "scripts" / "vllm_sources.py"), NEXT, str(target)]
    done = subprocess.run(script, capture_output=True, text=True)
    if "No matching distribution" in done.stderr or "NewConnectionError" in done.stderr:
        pytest.skip(f"vLLM {NEXT} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return target


def run(sources: Path, *command: str) -> subprocess.CompletedProcess[str]:
    found = environment(VLLM_TARGET_DEVICE="cpu")
    found["PYTHONPATH"] = os.pathsep.join([str(sources), found["PYTHONPATH"]])
    return subprocess.run(
        [sys.executable, *command], env=found, cwd=ROOT, capture_output=True, text=True
    )


def test_the_sources_are_those_of_the_next_release(sources: Path) -> None:
    done = run(sources, "-c", "import vllm; print(vllm.__version__, vllm.__file__)")
    assert done.stdout.split() == [NEXT, str(sources / "vllm" / "__init__.py")], done.stderr


def test_every_imported_name_exists(sources: Path) -> None:
    names = sorted({(module, name) for module, name, _ in imported_names(PACKAGE)})
    assert len(names) > 40
    check = (
        "import importlib, json, sys\n"
        "missing = []\n"
        "for module, name in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        found = importlib.import_module(module)\n"
        "        if name and not hasattr(found, name):\n"
        "            importlib.import_module(f'{module}.{name}')\n"
        "    except ImportError as error:\n"
        "        missing.append(f'{module} {name}: {error}')\n"
        "print(json.dumps(missing))\n"
    )
    done = run(sources, "-c", check, json.dumps(names))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_every_probed_name_still_occurs(sources: Path) -> None:
    names = {name for name, _ in probed_names(PACKAGE)} - OTHERS
    assert len(names) > 10
    for file in (sources / "vllm").rglob("*.py"):
        words = set(re.findall(r"\w+", file.read_text(errors="replace")))
        names -= words
    # torch's own classes have some of them.
    assert {name for name in names if not _torch_has(name)} == set()


def _torch_has(name: str) -> bool:
    import torch

    owners = (torch, torch.Tensor, torch.nn.Module, torch.nn.Parameter, torch.cuda)
    return any(hasattr(owner, name) for owner in owners)


def test_the_package_registers(sources: Path) -> None:
    ask = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config as get\n"
        "print(get('compressed_linear').__name__)\n"
    )
    done = run(sources, "-c", ask)
    assert done.stdout.split()[-1:] == ["CompressedLinearConfig"], done.stderr


@pytest.mark.parametrize("part", SUITE)
def test_the_package_passes_its_tests(sources: Path, part: str) -> None:
    """Other tests do not touch vLLM, or start engines, which the operators of another release need
    not fit."""
    done = run(sources, "-m", "pytest", "-q", "-m", "not slow and not e2e", "-n", "2", part)
    assert done.returncode == 0, done.stdout[-6000:]


def test_every_place_where_it_asks_a_config_is_known(sources: Path) -> None:
    assert unknown_places(sources / "vllm") == []
