# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint of a stranger cannot do: ``docs/security.md`` names these tests."""

from __future__ import annotations

import ast
import json
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.described import Described
from tests.support.repository import ROOT
from vllm.compressed_linear.checkpoint.headers import read_headers
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.settings import Settings

PACKAGE = ROOT / "vllm" / "compressed_linear"
SOURCES = sorted(PACKAGE.rglob("*.py"))

RUNS_CODE = {"eval", "exec", "compile", "__import__", "system", "popen", "Popen", "check_output"}
UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def calls(tree: ast.AST) -> set[str]:
    """``name`` and ``owner.name`` of everything that is called."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                found.add(node.func.id)
            elif isinstance(node.func, ast.Attribute):
                owner = node.func.value
                found.add(f"{owner.id if isinstance(owner, ast.Name) else ''}.{node.func.attr}")
    return found


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def words(tree: ast.AST) -> set[str]:
    """Names of keyword arguments, and every text."""
    found = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    return found | {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_unpickles_runs_text_or_enables_remote_code(file: Path) -> None:
    tree = ast.parse(file.read_text())
    called = calls(tree)
    assert not imports(tree) & UNPICKLES
    assert not called & {"torch.load", "pickle.load", "pickle.loads", "numpy.load", "np.load"}
    assert not called & (RUNS_CODE | {f"os.{name}" for name in RUNS_CODE})
    assert not called & {f"subprocess.{name}" for name in ("run", *RUNS_CODE)}
    assert "trust_remote_code" not in words(tree)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("torch.load(path)", {"torch.load"}),
        ("eval('1')", {"eval"}),
        ("os.system('x')", {"os.system"}),
    ],
)
def test_calls_are_found(line: str, found: set[str]) -> None:
    assert calls(ast.parse(line)) == found


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors.pkl", "training_args.bin"):
        (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "owned")))
    assert read_headers(model) is None
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "owned")))
    with pytest.raises(CheckpointError):
        read_headers(model)
    assert not (tmp_path / "owned").exists()


CLAIMS = {
    "a header of 8 EiB": struct.pack("<Q", 2**63) + b"{}",
    "a header of 1 PiB": struct.pack("<Q", 2**50) + b"{}",
    "a tensor of 1 PiB": {"dtype": "F32", "shape": [2**48], "data_offsets": [0, 2**50]},
    "a matrix of 0 rows of 1 Pi": {"dtype": "F32", "shape": [0, 2**50], "data_offsets": [0, 0]},
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_a_claim_of_a_header_allocates_nothing(claim: Any, tmp_path: Path) -> None:
    if isinstance(claim, dict):
        text = json.dumps({"a.weight": claim}).encode()
        claim = struct.pack("<Q", len(text)) + text
    (tmp_path / "model.safetensors").write_bytes(claim)
    tracemalloc.start()
    try:
        read_headers(tmp_path)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_reading_headers_reads_no_weights(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4 << 20)}, tmp_path / "model.safetensors")
    tracemalloc.start()
    read_headers(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_configuration_changes_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends, files and limits are the user's: a checkpoint names none of them."""
    for name in list(os.environ):
        if name.startswith("VLLM_COMPRESSED_LINEAR"):
            monkeypatch.delenv(name)
    before = Settings.read()
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    ours = {"backend": "evil", "cache": "/tmp/x", "plan_file": "/tmp/y", "tune_file": "/tmp/z"}
    described = Described.of(config | ours | {"compressed_linear": ours, "additional_config": ours})
    assert described.resolve("model.q_proj") == Described.of(config).resolve("model.q_proj")
    assert Settings.read() == before
