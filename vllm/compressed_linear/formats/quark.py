# SPDX-License-Identifier: Apache-2.0
"""AMD Quark: one configuration for all layers, others for layers by name, and exclusions."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from vllm.compressed_linear.formats.base import Format, register_format
from vllm.compressed_linear.formats.entries import Entries
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.quark_schemes import (
    TensorConfig,
    activation_of,
    input_tensors,
    weight_scheme,
)
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.descriptor import ActivationSpec

DEFAULT_PACKING = "reorder"


class Patterns(Entries):
    """Names of modules, patterns with wildcards, or ``re:`` and an expression that matches from
    their beginning. Renaming may break the latter two, so they are compared as written, too."""

    def keeps(self, spelling: str) -> bool:
        return spelling.startswith("re:") or _is_pattern(spelling)

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        if spelling.startswith("re:"):
            return self.expressions.matches(spelling[3:], names, spelling)
        if _is_pattern(spelling):
            return self.expressions.matches(fnmatch.translate(spelling), names, spelling)
        return spelling in names


def _is_pattern(spelling: str) -> bool:
    return any(sign in spelling for sign in "*?[")


@dataclass(frozen=True)
class Layers:
    """How layers are quantized. ``reason``: why they are left to vLLM."""

    weight: tuple[TensorConfig, ...] = ()
    activation: ActivationSpec | None = None
    reason: str = ""

    @classmethod
    def read(cls, fields: Fields, pack_method: str) -> Self:
        """Raises ``ConfigError`` naming the field."""
        weight, inputs, outputs = (
            _entries(fields, name) for name in ("weight", "input_tensors", "output_tensors")
        )
        activation = activation_of(inputs) if inputs else None
        reasons = []
        if weight and weight_scheme(weight, pack_method, _no_file) is None:
            reasons.append(f"weights as {' under '.join(map(str, weight))}")
        if inputs and activation is None:
            reasons.append(f"inputs as {' under '.join(map(str, inputs))}")
        if outputs or _entries(fields, "bias"):
            reasons.append("quantized outputs or biases")
        reason = f"quark {fields.where}: {', '.join(reasons)}" if reasons else ""
        return cls(tuple(weight), activation, reason)


def _no_file(name: str) -> None:
    return None


def _entries(fields: Fields, name: str) -> list[TensorConfig]:
    """One map, or a list of one for each level of scales; empty if there is none."""
    value = fields.values.get(name)
    where = f"{fields.where}.{name}"
    maps = value if isinstance(value, list) else [value]
    return [TensorConfig.read(found) for m in maps if (found := Fields.of(m, where))]


@register_format("quark")
@dataclass(frozen=True)
class Quark(Format):
    """``global_quant_config``, ``layer_type_quant_config``, ``layer_quant_config`` and ``exclude``.

    ``named``: pattern → how its layers are quantized; the first that matches goes before
    ``of_linear``, which goes before ``everywhere``.
    """

    aliases = ("quark",)
    vllm_name = "quark"

    exclude: Patterns
    layers: Patterns
    named: dict[str, Layers]
    of_linear: Layers | None
    everywhere: Layers
    pack_method: str

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        pack_method = fields.fields("export").word("pack_method") or DEFAULT_PACKING
        if not fields.fields("global_quant_config") and not fields.fields("layer_quant_config"):
            raise ConfigError("quark: global_quant_config is missing or empty")
        named = {
            name: Layers.read(found, pack_method)
            for name, found in fields.maps("layer_quant_config").items()
        }
        types = fields.maps("layer_type_quant_config")
        linear = next((types[name] for name in types if name.rpartition(".")[2] == "Linear"), None)
        cache = fields.fields("export").names("kv_cache_group")
        return cls(
            config,
            exclude=Patterns.of("exclude", fields.names("exclude")),
            layers=Patterns.of("layer_quant_config", [n for n in named if n not in cache]),
            named=named,
            of_linear=None if linear is None else Layers.read(linear, pack_method),
            everywhere=Layers.read(fields.fields("global_quant_config"), pack_method),
            pack_method=pack_method,
        )

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        try:
            found = cls.parse(config)
        except ConfigError:
            return None  # said when it is parsed
        all_layers = [found.everywhere, *found.named.values()]
        if any(layers.weight and not layers.reason for layers in all_layers):
            return None
        return "; ".join(layers.reason for layers in all_layers if layers.reason) or "no weights"

    def has_attention_scales(self, file: FileView) -> bool:
        return bool(Fields(self.config).fields("export").names("kv_cache_group"))

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        names = file.names_of(module)
        if (entry := self.exclude.first(names, kind)) is not None:
            return Unquantized(f"exclude: {entry}")
        if kind is LayerKind.EMBEDDING and not file.quantized_on_disk(module):
            return Unquantized("quark quantizes linear layers")
        entry = self.layers.first(names, kind)
        layers = self.everywhere if self.of_linear is None else self.of_linear
        if entry is not None:
            layers = self.named[entry]
        if (plain := file.unquantized_on_disk(module)) is not None:
            return plain
        if layers.reason:
            return Delegated(layers.reason)
        if not layers.weight:
            return Unquantized("its configuration has no weight")
        header = partial(file.header, module)
        scheme = weight_scheme(list(layers.weight), self.pack_method, header)
        assert scheme is not None
        if layers.activation is None:
            return scheme
        tensors = (*scheme.tensors, *input_tensors(layers.activation, header))
        return replace(scheme, activation=layers.activation, tensors=tensors)
