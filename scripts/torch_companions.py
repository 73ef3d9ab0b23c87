# SPDX-License-Identifier: Apache-2.0
"""Removes what cannot be imported with the installed torch: torchvision, torchaudio, torchcodec.

    python scripts/torch_companions.py

vLLM's CPU build asks for the three of them. Each contains a library that is compiled for one build
of torch. Where pip finds only a build for another torch (for one with CUDA, say), the import fails,
and so does every import that tries it, although vLLM itself runs without it. Such a package is
removed, with one line that says why and what then needs it; one that can be imported stays.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

NEEDED_BY = {
    "torchvision": "most vision-language models cannot be imported without it, among them "
    "Qwen3.5/3.6, Qwen-VL, Gemma 3/4, Mistral 3 and Llama 4",
    "torchaudio": "some speech models cannot be imported without it, among them FunASR, "
    "Cohere ASR and MiDashengLM",
    "torchcodec": "models that take video or audio files may not decode them without it",
}


def import_error(module: str) -> str | None:
    """Why a new process cannot import ``module``: the last line of its error. None if it can."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def prune(remove: Callable[[str], None]) -> Iterator[str]:
    """Calls ``remove`` with the name of each installed package that cannot be imported, and yields
    a line for each."""
    for name, needed_by in NEEDED_BY.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        error = import_error(name)
        if error is None:
            continue
        remove(name)
        yield (
            f"removed {name} {found}, which cannot be imported with torch {version('torch')} "
            f"({error}); {needed_by}. No other build was tried: if an index has one for this "
            "torch, name it with TORCH_INDEX=URL or install it by hand"
        )


def uninstall(name: str) -> None:
    """Removes the package ``name`` from the environment of this Python."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", name], check=True)


if __name__ == "__main__":
    for line in prune(uninstall):
        print(line)
