# SPDX-License-Identifier: Apache-2.0
"""A checkpoint format: from a ``quantization_config`` to what each module holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeVar

from vllm.compressed_linear.formats.entries import Entries, Rename
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.resolution import ConfigError, LayerKind, Resolution


@dataclass(frozen=True)
class Hints:
    """What a configuration claims of values that only the data decides. No format trusts it, so it
    says no more than what is likely. ``reordered``: a group index reorders channels.
    ``symmetric``: all zero points are the middle code."""

    reordered: bool = False
    symmetric: bool = False


@dataclass(frozen=True)
class Format(ABC):
    """One checkpoint's ``quantization_config``, parsed. A value: nothing changes it.

    A format is a frozen dataclass that implements ``parse`` and ``resolve``. Its fields of type
    ``Entries`` are renamed, and asked what they matched, by this class.
    """

    aliases: ClassVar[tuple[str, ...]] = ()
    """Values of ``--quantization`` that mean this format."""
    vllm_name: ClassVar[str | None] = None
    """vLLM's own name for it, for layers that are delegated."""
    marker_tensors: ClassVar[tuple[str, ...]] = ()
    """Last parts of the names of tensors that only a quantized module has."""

    config: dict[str, Any]
    """The ``quantization_config`` as it was written."""

    @classmethod
    @abstractmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        """Read the configuration. Raises ``ConfigError`` naming the field."""

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        """Why none of this checkpoint is for us (then vLLM's own code gets it), or None."""
        return None

    @abstractmethod
    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        """What the checkpoint holds for ``module``, vLLM's name of it without fused layers.

        Raises ``ConfigError`` where the configuration says something impossible of it.
        """

    def has_attention_scales(self) -> bool:
        """Whether the checkpoint quantizes the KV cache; handled by vLLM's own config."""
        return False

    def hints(self) -> Hints:
        """What the configuration claims of the data."""
        return Hints()

    def renamed(self, rename: Rename) -> Self:
        """The same format for a model that renames the modules of the checkpoint."""
        changes: dict[str, Any] = {
            name: entries.renamed(rename) for name, entries in self._entries().items()
        }
        return replace(self, **changes)

    def unmatched_entries(
        self, file: FileView, asked: Mapping[str, LayerKind | None]
    ) -> list[tuple[str, str]]:
        """(field, entry as written) of every entry that selects no module at all.

        ``asked``: vLLM's names of the modules that a model has, with their kinds where known.
        Modules of ``file`` count too: a model may leave a part of the checkpoint aside.
        """
        modules = [(file.names_of(module), kind) for module, kind in asked.items()]
        modules += [(file.names_of(module), None) for module in file.modules if module not in asked]
        return [
            (entries.field, entry)
            for entries in self._entries().values()
            for entry in entries.unmatched(modules)
        ]

    def _entries(self) -> dict[str, Entries]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Entries)}


_FORMATS: dict[str, type[Format]] = {}

F = TypeVar("F", bound=type[Format])


def register_format(*quant_methods: str) -> Callable[[F], F]:
    """Class decorator: this format reads checkpoints whose ``quant_method`` is one of these."""

    def add(cls: F) -> F:
        for quant_method in quant_methods:
            known = _FORMATS.get(quant_method)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ValueError(f"quant_method {quant_method!r} is taken by {known.__qualname__}")
            _FORMATS[quant_method] = cls
        return cls

    return add


def quant_method_of(config: dict[str, Any]) -> str:
    """``quant_method`` in lower case, as some tools wrote it in upper case."""
    return str(config.get("quant_method") or "").lower()


def require(config: dict[str, Any], key: str, kind: type, *aliases: str) -> Any:
    """``config[key]`` (or an alias) as ``kind``. ``ConfigError`` when absent or of another kind."""
    for name in (key, *aliases):
        if name in config and config[name] is not None:
            try:
                return kind(config[name])
            except (TypeError, ValueError):
                raise ConfigError(
                    f"quantization_config.{name} is {config[name]!r}, expected {kind.__name__}"
                ) from None
    raise ConfigError(f"quantization_config has no {key} (keys: {', '.join(config)})")
