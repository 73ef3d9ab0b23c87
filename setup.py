# SPDX-License-Identifier: Apache-2.0
"""Builds the distribution: the Python files, the finder that names them, and the native library.

Everything that can be said declaratively is in pyproject.toml. Here stands what cannot: the package
lies in `vllm/compressed_linear` and is installed as `_vllm_compressed_linear` (why: see
`overlay/_vllm_compressed_linear_finder.py`), and CMake builds `csrc`.

Environment: MAX_JOBS limits the compiler processes; COMPRESSED_LINEAR_CMAKE_ARGS goes to CMake.
COMPRESSED_LINEAR_CUDA is ON or OFF; by default CUDA kernels are built where torch has CUDA and nvcc
is there. TORCH_CUDA_ARCH_LIST says for which GPUs (by default 8.0, 9.0, 10.0 and 12.0+PTX).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

# setuptools provides distutils and must be imported before it.
from distutils.command.install_data import install_data  # isort: skip

ROOT = Path(__file__).parent.resolve()
SOURCE = "vllm/compressed_linear"
INSTALLED_AS = "_vllm_compressed_linear"
LIBRARY = "libcompressed_linear.so"
CUDA_LIBRARY = "libcompressed_linear_cuda.so"
#: CMake's tree is shared by editable and wheel builds, so the second compiles nothing again.
CMAKE_TREE = ROOT / "build" / "cmake"


def find_tool(name: str) -> str:
    """The program `name` of this interpreter's environment, else of PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise SystemExit(f"error: {name} is needed to build csrc: pip install {name}")
    return found


def torch_cmake_path() -> str:
    """Where torch keeps its CMake package."""
    try:
        import torch.utils
    except ImportError as error:
        raise SystemExit(
            f"error: building csrc needs torch, which {sys.executable} cannot import ({error}): "
            "pip install torch==2.13.0, then use pip's --no-build-isolation"
        ) from error
    return torch.utils.cmake_prefix_path


class BuildNative(Command):
    """Builds csrc with CMake into `lib/` of the package; in place for an editable install."""

    description = "build the native library with CMake"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        self.editable_mode = False
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def output_dir(self) -> Path:
        """The directory the library is written to."""
        if self.editable_mode:
            return ROOT / SOURCE / "lib"
        assert self.build_lib is not None
        return Path(self.build_lib).resolve() / INSTALLED_AS / "lib"

    def get_outputs(self) -> list[str]:
        if self.editable_mode:
            return []
        cuda = self.output_dir / CUDA_LIBRARY
        return [str(self.output_dir / LIBRARY), *([str(cuda)] if cuda.is_file() else [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
        return [str(path.relative_to(ROOT)) for path in (ROOT / "CMakeLists.txt", *sources)]

    def run(self) -> None:
        cmake = find_tool("cmake")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(CMAKE_TREE), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_PREFIX_PATH={torch_cmake_path()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DCOMPRESSED_LINEAR_OUTPUT_DIR={self.output_dir}",
            f"-DCOMPRESSED_LINEAR_CUDA={os.environ.get('COMPRESSED_LINEAR_CUDA') or 'AUTO'}",
            *shlex.split(os.environ.get("COMPRESSED_LINEAR_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for command in (configure, [cmake, "--build", str(CMAKE_TREE), "--parallel", jobs]):
            print("+", shlex.join(command), flush=True)
            if (code := subprocess.run(command, cwd=ROOT).returncode) != 0:
                raise SystemExit(f"error: csrc was not built: `{shlex.join(command)}` ended {code}")
        if not (self.output_dir / LIBRARY).is_file():
            raise SystemExit(f"error: csrc was built, but {self.output_dir / LIBRARY} is missing")


class Build(build):
    """The build, with the native library as one more step."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]


class InstallOverlay(install_data):
    """Installs the data files, which are the finder and its .pth, into site-packages itself."""

    def finalize_options(self) -> None:
        self.set_undefined_options("install", ("install_lib", "install_dir"))
        super().finalize_options()


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of this platform: the library links to torch, not to Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    """A distribution that is not pure Python although setuptools knows no extension of it."""

    def has_ext_modules(self) -> bool:
        return True

    def has_data(self) -> bool:
        """What an editable install asks before it runs `install_data`."""
        return bool(self.has_data_files())


packages = find_packages(str(ROOT / SOURCE))
setup(
    distclass=NativeDistribution,
    packages=[INSTALLED_AS, *(f"{INSTALLED_AS}.{name}" for name in packages)],
    package_dir={INSTALLED_AS: SOURCE},
    package_data={INSTALLED_AS: ["py.typed", "backends/triton/*.json"]},
    include_package_data=False,
    data_files=[
        (
            "",
            ["overlay/_vllm_compressed_linear_finder.py", "overlay/vllm_compressed_linear.pth"],
        )
    ],
    cmdclass={
        "bdist_wheel": PlatformWheel,
        "build": Build,
        "build_native": BuildNative,
        "install_data": InstallOverlay,
    },
)
