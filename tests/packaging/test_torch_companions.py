# SPDX-License-Identifier: Apache-2.0
"""``make setup`` removes torchvision and the like only where they cannot be imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.repository import ROOT


@pytest.fixture
def companions() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "torch_companions", ROOT / "scripts" / "torch_companions.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which this Python and those that it starts find packages first."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


def install(site: Path, name: str, version: str, code: str) -> None:
    (site / f"{name}.py").write_text(code)
    metadata = site / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")'


def test_what_cannot_be_imported_is_removed_and_said(companions: ModuleType, site: Path) -> None:
    install(site, "torchvision", "0.99", BROKEN)
    install(site, "torchaudio", "2.99", "")
    install(site, "torchcodec", "0.98", "import os; os._exit(3)")
    removed: list[str] = []
    vision, codec = companions.prune(removed.append)
    assert removed == ["torchvision", "torchcodec"]
    assert "torchvision 0.99" in vision
    assert "RuntimeError: operator torchvision::nms does not exist" in vision
    for model in ("Qwen3.5/3.6", "Qwen-VL", "Gemma 3/4", "Mistral 3", "Llama 4"):
        assert model in vision
    assert "No other build was tried" in vision
    assert "torchcodec 0.98" in codec
    assert "exit status 3" in codec


def test_what_can_be_imported_stays(companions: ModuleType, site: Path) -> None:
    for name in companions.NEEDED_BY:
        install(site, name, "1.0", "")
    assert list(companions.prune(pytest.fail)) == []


def test_what_is_not_installed_is_not_looked_for(
    companions: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companions, "NEEDED_BY", {"torch_nothing_of_this_name": "nothing"})
    assert list(companions.prune(pytest.fail)) == []


def test_it_is_what_setup_runs() -> None:
    assert "$(BIN)/python scripts/torch_companions.py" in (ROOT / "Makefile").read_text()
