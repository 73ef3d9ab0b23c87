# SPDX-License-Identifier: Apache-2.0
"""What needs no vLLM is imported without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import importlib, importlib.machinery, importlib.util, json, pkgutil, sys, types

# A package that has nothing but a path: the real one would run its own __init__, which takes 3 s.
stub = types.ModuleType("vllm")
stub.__path__ = [sys.argv[1]]
sys.modules["vllm"] = stub

ours = "vllm.compressed_linear"
# Not by a plain import: the finder of the installed package answers only where vLLM is.
spec = importlib.machinery.PathFinder.find_spec(ours, stub.__path__)
sys.modules[ours] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[ours])
for folder in ("settings", "spec", "machine", "checkpoint", "formats", "backends", "prepare",
               "testing"):
    module = importlib.import_module(f"{ours}.{folder}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{ours}.{folder}."):
        if "vllm_native" not in found.name and not found.name.endswith("__main__"):
            importlib.import_module(found.name)

from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.registry import parse

found = parse({"quant_method": "gptq", "bits": 4, "group_size": 128})
print(json.dumps({
    "ours": [name for name in sys.modules if name.startswith(ours)],
    "others": [name for name in sys.modules
               if name.startswith("vllm.") and not name.startswith(ours)],
    "stub": sys.modules["vllm"] is stub,
    "scheme": str(found.resolve("model.layers.0.mlp.up_proj", "linear", FileView())),
}))
"""


def test_formats_specs_checkpoints_and_backends_import_nothing_of_vllm() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / "vllm")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["stub"]
    assert found["others"] == []
    folders = {name.split(".")[2] for name in found["ours"] if name.count(".") > 2}
    expected = {"spec", "machine", "checkpoint", "formats", "backends", "prepare", "testing"}
    assert folders == expected
    assert "uint4" in found["scheme"]
