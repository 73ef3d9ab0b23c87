# SPDX-License-Identifier: Apache-2.0
"""Protocol of a checkpoint format: from a ``quantization_config`` to the scheme of each module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeVar

import torch

from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.entries import Entries, Rename
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.resolution import LayerKind, Resolution


@dataclass(frozen=True)
class Hints:
    """Claims of a configuration about values that only the data decides. No format trusts them;
    they only say what is likely. ``reordered``: a group index reorders channels.
    ``symmetric``: all zero points are the middle code."""

    reordered: bool = False
    symmetric: bool = False


@dataclass(frozen=True)
class Format(ABC):
    """One checkpoint's parsed ``quantization_config``; immutable.

    A format is a frozen dataclass that implements ``parse`` and ``resolve``. Its fields of type
    ``Entries`` are renamed, and asked what they matched, by this class.
    """

    aliases: ClassVar[tuple[str, ...]] = ()
    """Values of ``--quantization`` for this format."""
    vllm_name: ClassVar[str | None] = None
    """vLLM's own name for it, for layers that are delegated."""
    marker_tensors: ClassVar[tuple[str, ...]] = ()
    """Last components of tensor names that only quantized modules have."""

    restates: ClassVar[bool] = False
    """Whether the files hold other tensors than ``resolve`` describes, see ``restated``."""

    config: dict[str, Any]
    """The ``quantization_config`` as it was written."""

    @classmethod
    @abstractmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        """Read the configuration. Raises ``ConfigError`` naming the field."""

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        """Why the whole checkpoint is left to vLLM's own code, or None."""
        return None

    @abstractmethod
    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        """Describe what the checkpoint holds for ``module`` (vLLM's name, of a member if fused).

        Raises ``ConfigError`` if the configuration is invalid for it.
        """

    def has_attention_scales(self, file: FileView) -> bool:
        """Whether the checkpoint quantizes the KV cache; handled by vLLM's own config."""
        return False

    def kv_cache_scheme(self) -> dict[str, Any] | None:
        """What vLLM's attention layers read, to quantize the KV cache as the checkpoint says."""
        return None

    def delegated(self) -> tuple[str | None, dict[str, Any]]:
        """vLLM's own name and configuration for layers that are delegated."""
        return self.vllm_name, self.config

    def misread_by_vllm(self) -> str:
        """Why vLLM would compute wrong numbers for delegated layers; "" if it does not."""
        return ""

    def restated_headers(self, headers: Headers) -> Headers:
        """Headers of the tensors as ``restated`` gives them."""
        return headers

    def restated(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of the files as ``resolve`` describes them, for a format whose files say it
        in a form that no ``StoredTensor`` describes; then ``restates`` is true."""
        yield from weights

    def hints(self) -> Hints:
        """Claims of the configuration about the data."""
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

        ``asked``: vLLM's names of the model's modules, with their kinds if known. Modules of
        ``file`` count too: a model may ignore a part of the checkpoint.
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
    """``quant_method`` in lower case; some tools wrote upper case. ModelOpt does not always write
    one, but its ``quant_algo``, perhaps one level deeper; MLX never does."""
    named = str(config.get("quant_method") or "").lower()
    if named == "mxfp4" and config.get("format") == "mxfp4-pack-quantized":
        return "compressed-tensors"  # as vLLM renames it for some models
    inner = config.get("quantization")
    for found in (config, inner if isinstance(inner, dict) else {}):
        if not named and isinstance(found.get("quant_algo"), str):
            return "modelopt"
    return named or ("mlx" if is_mlx(config) else "")


def mlx_configuration(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """``quantization`` of a model's config.json, if it is one of MLX, which until 2024 wrote it
    under this name only; else None."""
    found = model.get("quantization")
    if not isinstance(found, Mapping) or quant_method_of(dict(found)) != "mlx":
        return None
    return dict(found)


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a configuration without ``quant_method`` is one of MLX: it has nothing but settings
    and entries of modules, which are maps, or false for an unquantized one."""
    own = {"group_size", "bits", "mode", "quant_method"}
    others = [value for key, value in config.items() if key not in own]
    named = {"group_size", "bits"} <= config.keys()
    return named and all(value is False or isinstance(value, Mapping) for value in others)
