# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of a kernel: registers, spills and memory as ptxas reports them, and the
instructions of the binary. Needs nvcc, and cuobjdump or nvdisasm from the CUDA toolkit or from
Triton's wheel; no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.support.repository import ROOT

CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a binary. Bytes are those of a thread; ``shared`` is static shared memory."""

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Binary:
    """A source compiled for one architecture."""

    kernels: tuple[Kernel, ...]
    cubin: Path

    def instructions(self) -> dict[str, Counter[str]]:
        """How often each instruction occurs, by kernel; names with their modifiers."""
        found: dict[str, Counter[str]] = {}
        current: Counter[str] | None = None
        for line in disassembly(self.cubin).splitlines():
            if header := re.search(r"\.section\s+\.text\.(\w+)|Function : (\w+)", line):
                current = found.setdefault(header[1] or header[2], Counter())
            elif current is not None and (
                code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
            ):
                current[code[1]] += 1
        names = demangled(list(found))
        return {names[name]: counts for name, counts in found.items()}


def run(*command: str | Path) -> str:
    """Standard output and standard error of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise AssertionError(
            f"{' '.join(map(str, command))} ended {done.returncode}\n{done.stdout}"
        )
    return done.stdout


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: from PATH, beside nvcc, or out of Triton's wheel."""
    places = [shutil.which(name)]
    if NVCC is not None:
        places.append(shutil.which(name, path=str(Path(NVCC).resolve().parent)))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        places.append(shutil.which(name, path=str(folder)))
    return next((place for place in places if place is not None), None)


def compile_for(architecture: int, source: Path, folder: Path) -> Binary:
    """``source`` for sm_``architecture``, with the options of csrc/cuda/CMakeLists.txt."""
    assert NVCC is not None
    cubin = folder / f"{source.stem}.sm_{architecture}.cubin"
    log = run(
        *(NVCC, "-std=c++17", "-O3", "-DNDEBUG", f"-I{CSRC}", "-Xptxas=-v", "--cubin"),
        *(f"-arch=sm_{architecture}", "-o", cubin, source),
    )
    names = demangled(re.findall(r"Compiling entry function '(\w+)'", log))
    kernels = []
    for entry in re.split(r"(?=Compiling entry function)", log)[1:]:
        name = re.search(r"entry function '(\w+)'", entry)
        stack = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        used = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        if name is None or stack is None or used is None:
            raise AssertionError(f"ptxas says something else than expected:\n{entry}")
        kernels.append(
            Kernel(
                names[name[1]],
                int(used[1]),
                *(int(number) for number in stack.groups()),
                int(shared[1]) if shared else 0,
            )
        )
    return Binary(tuple(kernels), cubin)


def disassembly(cubin: Path) -> str:
    """The binary as text, by whichever disassembler there is."""
    if (tool := find_tool("nvdisasm")) is not None:
        return run(tool, "-c", cubin)
    tool = find_tool("cuobjdump")
    assert tool is not None, "neither nvdisasm nor cuobjdump is there"
    return run(tool, "-sass", cubin)


def demangled(names: list[str]) -> dict[str, str]:
    """What C++ calls functions, without their arguments."""
    text = subprocess.run(
        ["c++filt", "-p", *names], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    plain = [re.sub(r"compressed_linear::cuda::", "", line) for line in text.splitlines()]
    return dict(zip(names, plain, strict=True))
