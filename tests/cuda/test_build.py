# SPDX-License-Identifier: Apache-2.0
"""What only the CUDA compiler can say of the kernels: that they compile for every architecture, fit
its registers without spilling, and become the instructions they are written for. No GPU is needed,
and nothing here says that a kernel has run on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.cuda_compiler import CSRC, NVCC, compile_for, find_tool
from tests.support.repository import ROOT

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DISASSEMBLER = find_tool("nvdisasm") or find_tool("cuobjdump")


@dataclass(frozen=True)
class Expected:
    """Of every kernel of a source whose name matches ``kernel``, counted for one thread.

    ``registers``: what lets as many blocks run on a multiprocessor as the launch is made for.
    ``spill``: bytes that may be written to local memory, read back, and lie there. ``shared``:
    bytes of static shared memory. ``instructions``: regular expressions, each of which some
    instruction must match.
    """

    source: str
    kernel: str
    registers: int
    spill: int = 0
    shared: int = 0
    instructions: tuple[str, ...] = ()


# 16-byte copies that pass the registers by, fragments from shared memory, tensor cores.
GEMM = (r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M88\.4", r"HMMA\.16816\.F32", "LOP3")

EXPECTED = (
    # 5 blocks of 256 threads; whole words from and to global memory, codes through shared memory.
    Expected(
        "marlin/repack.cu",
        r"repack_codes<\d+>",
        48,
        instructions=(r"LDG\.E(\.\w+)*\.128", r"STS(\.U8)?", r"LDS\.U16", r"STG\.E", "BAR"),
    ),
    Expected("marlin/repack.cu", r"repack_(scales|zeros)<.*>", 40, instructions=("STS", "LDS")),
    Expected(
        "marlin/launch.cu",
        "marlin::gather",
        40,
        instructions=(r"LDG\.E(\.\w+)*\.128", r"STG\.E\.128"),
    ),
    # One block of 256 threads.
    *(
        Expected(source, "marlin::gemm<.*>", 255, instructions=GEMM)
        for source in ("marlin/kernels_bf16.cu", "marlin/kernels_fp16.cu")
    ),
)
SOURCES = sorted(str(path.relative_to(CSRC / "cuda")) for path in (CSRC / "cuda").rglob("*.cu"))

SAMPLE = """
#include "cuda/marlin/kernel.h"
namespace compressed_linear::cuda::marlin {
void (*sample[])(Params) = {gemm<Half, Element::uint4, 0>, gemm<BFloat16, Element::e2m1, 2>};
}
"""
"""Two of the thirty kernels of the GEMM, which take half a minute of a core to compile."""


def check(source: Path, like: str, architecture: int, folder: Path) -> None:
    """Compiles ``source`` and holds it against what is expected of ``like``."""
    binary = compile_for(architecture, source, folder)
    instructions = {} if DISASSEMBLER is None else binary.instructions()
    assert binary.kernels
    for kernel in binary.kernels:
        [expected] = (
            e for e in EXPECTED if e.source == like and re.fullmatch(e.kernel, kernel.name)
        )
        assert max(kernel.spill_stores, kernel.spill_loads, kernel.stack) <= expected.spill, kernel
        assert kernel.registers <= expected.registers, kernel
        assert kernel.shared <= expected.shared, kernel
        if DISASSEMBLER is None:
            continue
        found = instructions[kernel.name]
        assert found.total() > 50, kernel
        for wanted in expected.instructions:
            assert any(re.match(wanted, name) for name in found), (kernel.name, wanted, found)


def test_every_source_is_built_and_has_expectations() -> None:
    assert {expected.source for expected in EXPECTED} == set(SOURCES)
    built = (CSRC / "cuda" / "CMakeLists.txt").read_text()
    assert sorted(re.findall(r"[\w/]+\.cu\b", built)) == SOURCES


@pytest.mark.parametrize("source", ["marlin/launch.cu", "marlin/repack.cu", "a sample of the GEMM"])
def test_kernels_fit_the_oldest_architecture(source: str, tmp_path: Path) -> None:
    if source in SOURCES:
        check(CSRC / "cuda" / source, source, ARCHITECTURES[0], tmp_path)
    else:
        sample = tmp_path / "sample.cu"
        sample.write_text(SAMPLE)
        check(sample, "marlin/kernels_fp16.cu", ARCHITECTURES[0], tmp_path)
    if DISASSEMBLER is None:
        pytest.skip("checked all but the instructions: neither nvdisasm nor cuobjdump is there")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_fit_every_architecture(source: str, architecture: int, tmp_path: Path) -> None:
    check(CSRC / "cuda" / source, source, architecture, tmp_path)
    assert DISASSEMBLER is not None, "neither nvdisasm nor cuobjdump is there"


@pytest.mark.slow
def test_the_library_is_built_on_request(tmp_path: Path) -> None:
    """Whatever torch is there; all of its ops are then in the library, which is not loaded."""
    command = [
        *("cmake", "-S", str(ROOT), "-B", str(tmp_path / "tree"), "-G", "Ninja"),
        "-DCMAKE_BUILD_TYPE=Release",
        "-DCOMPRESSED_LINEAR_CUDA=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCOMPRESSED_LINEAR_OUTPUT_DIR={tmp_path}",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": "9.0+PTX", "PATH": path}
    target = ["cmake", "--build", str(tmp_path / "tree"), "--target", "compressed_linear_cuda"]
    for step in (command, target):
        subprocess.run(step, check=True, env=environment)
    library = tmp_path / "libcompressed_linear_cuda.so"
    assert library.is_file()
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True
    ).stdout
    assert "torch_library_impl" in symbols
    # Of CUDA only what torch brings: the runtime is inside.
    assert set(re.findall(r"\bU (\w*cuda\w*)", symbols)) == {
        "aoti_torch_device_type_cuda",
        "aoti_torch_get_current_cuda_stream",
    }
