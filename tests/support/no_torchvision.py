# SPDX-License-Identifier: Apache-2.0
"""A stand-in for torchvision where it is not installed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock


@contextmanager
def torchvision_or_stand_in() -> Iterator[None]:
    """Text needs none of it, and builds of it for CPUs are not on every index."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    # The transformers library asks for the version when this module is first imported.
    import transformers.models.auto.image_processing_auto  # noqa: F401

    finder = NoTorchvision()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, whose names vLLM imports where it defines models that see."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return _AnyName(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


class _AnyName(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)
