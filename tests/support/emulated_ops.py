# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels as ops on the CPU, in the emulator: a library that only tests build and load."""

from __future__ import annotations

import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import torch

from tests.support.repository import ROOT
from vllm.compressed_linear.machine import native

TREE = ROOT / "build" / "cmake"
TARGET = "compressed_linear_emulated"


@cache
def load() -> None:
    """Builds the library in the tree that `make setup` has made, and loads it."""
    native.load()
    cmake = Path(sysconfig.get_path("scripts")) / "cmake"
    done = subprocess.run(
        [cmake, "--build", TREE, "--target", TARGET, "--parallel", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    torch.ops.load_library(str(TREE / f"lib{TARGET}.so"))
