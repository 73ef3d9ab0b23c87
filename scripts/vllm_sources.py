# SPDX-License-Identifier: Apache-2.0
"""Python sources of another vLLM release, on the compiled operators of the installed CPU build.

    python scripts/vllm_sources.py 0.33.0 build/vllm-0.33.0

vLLM for GPUs is released before vLLM for CPUs. What this package needs of it is Python, so a
release can be tested on a machine without a GPU: the wheel is downloaded without its requirements,
its Python files are unpacked into the directory, and the CPU libraries of the installed vLLM are
linked there. With the directory first in PYTHONPATH and VLLM_TARGET_DEVICE=cpu, ``import vllm``
finds it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

DATA = (".py", ".json", ".pyi")


def download(version: str, directory: Path) -> Path:
    """The wheel of vLLM ``version``. Raises ``CalledProcessError`` if no index has it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    only = ["--no-deps", "--only-binary", ":all:", "--dest", str(directory)]
    subprocess.run([*pip, *only, f"vllm=={version}"], check=True)
    (wheel,) = directory.glob("vllm-*.whl")
    return wheel


def unpack(wheel: Path, target: Path) -> None:
    """Extract the sources and the metadata, but not the entry points: the installed vLLM has the
    same ones."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            metadata = ".dist-info/" in name and name.endswith("/METADATA")
            if metadata or (name.startswith("vllm/") and name.endswith(DATA)):
                archive.extract(name, target)


def link_operators(target: Path) -> None:
    """Link the libraries of the installed vLLM next to the sources."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("error: no vLLM is installed whose compiled operators could be used")
    for library in Path(spec.origin).parent.glob("*.so"):
        link = target / "vllm" / library.name
        if not link.exists():
            link.symlink_to(library)


def provide(version: str, target: Path) -> None:
    """Make ``target`` unless it is complete."""
    complete = target / ".complete"
    if complete.exists():
        return
    with tempfile.TemporaryDirectory() as directory:
        unpack(download(version, Path(directory)), target)
    link_operators(target)
    complete.touch()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    provide(sys.argv[1], Path(sys.argv[2]))
