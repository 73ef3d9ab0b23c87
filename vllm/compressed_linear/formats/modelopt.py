# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt: FP8, MXFP8, NVFP4, MXFP4, AWQ and INT8 weights, one kind or a kind for each
module (modelopt ``export/quant_utils.py``, ``export/convert_hf_config.py``).

The configuration is in config.json, or in hf_quant_config.json with other names of its fields.
Excluded modules are given by wildcards over the checkpoint's names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from vllm.compressed_linear.checkpoint.bounded_read import read_json_file
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.base import Format, register_format
from vllm.compressed_linear.formats.entries import Components
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.modelopt_algorithms import (
    ALGORITHMS,
    Algorithm,
    algorithm_on_disk,
    modelopt_scheme,
)
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)

MIXED = "MIXED_PRECISION"
SEPARATE_FILE = "hf_quant_config.json"


class Wildcards(Components):
    """Entries that select modules by ``*`` and ``?`` over full names, or by whole components."""

    def keeps(self, spelling: str) -> bool:
        return "*" in spelling

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        if "*" in spelling or "?" in spelling:
            return any(fnmatchcase(name, spelling) for name in names)
        return super().selects(spelling, names, kind)


class Layers(Components):
    """Entries that select modules by their full names, or those of their parents."""

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        return any(f"{name}.".startswith(f"{spelling}.") for name in names)


@register_format("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed", "mxfp8")
@dataclass(frozen=True)
class ModelOpt(Format):
    """``algorithm``: of all modules, "" if each has its own. ``layers``, ``of_layers``: those that
    have one → its name and group size (0 if not given)."""

    aliases = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
    marker_tensors = ("weight_scale", "weight_scale_2")

    algorithm: str
    group_size: int
    excluded: Wildcards
    layers: Layers
    of_layers: dict[str, tuple[str, int]]
    inputs: bool
    """Whether the configuration says that inputs are quantized, where the algorithm does not."""
    cache: str

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = _inner(config)
        algorithm = _algorithm(config)
        of_layers = {
            name: (layer.word("quant_algo").upper(), layer.integer("group_size", default=0))
            for name, layer in fields.maps("quantized_layers").items()
        }
        if algorithm not in (*ALGORITHMS, MIXED):
            raise ConfigError(_unknown(algorithm))
        field = next((f for f in ("exclude_modules", "ignored_layers") if f in fields.values), "")
        field = field or "ignore"
        return cls(
            config,
            "" if algorithm == MIXED else algorithm,
            fields.integer("group_size", default=0),
            Wildcards.of(field, fields.names(field)),
            Layers.of("quantized_layers", of_layers),
            of_layers,
            inputs=_inputs_quantized(fields),
            cache=_cache(fields),
        )

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        algorithm = _algorithm(config)
        if algorithm == MIXED:
            layers = _inner(config).maps("quantized_layers").values()
            algorithms = {layer.word("quant_algo").upper() for layer in layers}
            if not algorithms or algorithms & ALGORITHMS.keys():
                return None
            return _unknown(", ".join(sorted(algorithms)))
        return None if algorithm in ALGORITHMS else _unknown(algorithm)

    def has_attention_scales(self, file: FileView) -> bool:
        return bool(self.cache) or file.has_attention_scales()

    def delegated(self) -> tuple[str | None, dict[str, Any]]:
        names = self.of_layers.values() if not self.algorithm else [(self.algorithm, 0)]
        known = {ALGORITHMS[name].vllm_name for name, _ in names if name in ALGORITHMS}
        own = "modelopt_mixed" if not self.algorithm else known.pop()
        config: dict[str, Any] = {
            "quant_method": own,
            "quant_algo": self.algorithm or MIXED,
            "ignore": list(self.excluded.spellings.values()),
            "kv_cache_scheme": None,
        }
        if self.group_size:
            config["group_size"] = self.group_size
        if self.of_layers:
            config["quantized_layers"] = {
                name: {"quant_algo": algorithm} | ({"group_size": size} if size else {})
                for name, (algorithm, size) in self.of_layers.items()
            }
        if self.cache == "fp8":
            config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        if (groups := _inner(self.config).values.get("config_groups")) is not None:
            config["config_groups"] = groups
        return own or None, config

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        if (found := file.unquantized_on_disk(module)) is not None:
            return found
        names, quantized = file.names_of(module), file.quantized_on_disk(module)
        layer = self.layers.first(names)
        name, size = (self.algorithm, 0) if layer is None else self.of_layers[layer]
        if not quantized:
            if (entry := self.excluded.first(names)) is not None:
                return Unquantized(f"{self.excluded.field}: {entry}")
            if not name:
                return Unquantized("not in quantized_layers")
            if kind is LayerKind.EMBEDDING and layer is None:
                return Unquantized("embeddings are not quantized")
        stated = ALGORITHMS.get(name)
        if name and stated is None:
            return Delegated(_unknown(name))
        algorithm = algorithm_on_disk(module, file, self._with_inputs(stated))
        if algorithm is None:
            held = ", ".join(sorted(file.tensors_on_disk(module) or ()))
            return Delegated(f"tensors of no algorithm of ModelOpt that is known ({held})")
        # With several kinds, a size for all means NVFP4, whose groups have one size anyway.
        size = size or (self.group_size if self.algorithm else 0)
        return modelopt_scheme(module, file, algorithm, size)

    def _with_inputs(self, stated: Algorithm | None) -> Algorithm | None:
        """``stated`` as ``config_groups`` make it exact."""
        return None if stated is None else stated.with_inputs(self.inputs, self.config)


def with_separate(directory: str | Path, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with what it lacks and the separate file has: the list of modules, and the size of
    groups."""
    path = Path(directory) / SEPARATE_FILE
    fields = _inner(config)
    lists = ("quantized_layers",) if _algorithm(config) == MIXED else ()
    lacks = [name for name in (*lists, "group_size") if fields.values.get(name) is None]
    if not lacks or not path.is_file():
        return config
    try:
        found = read_json_file(path, "the configuration of ModelOpt")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: {type(found).__name__}, expected a map")
    separate = _inner(found).values
    more = {name: separate[name] for name in lacks if separate.get(name) is not None}
    return {**config, **fields.values, **more} if more else config


def _inner(config: dict[str, Any]) -> Fields:
    """The fields, which the separate file has one level deeper."""
    fields = Fields(config)
    if config.get("quant_algo") is None and isinstance(config.get("quantization"), dict):
        return fields.fields("quantization")
    return fields


def _algorithm(config: dict[str, Any]) -> str:
    found = _inner(config).word("quant_algo").upper()
    if not found and str(config.get("quant_method") or "").lower().endswith("mxfp8"):
        return "MXFP8"  # MiniMax
    return found


def _inputs_quantized(fields: Fields) -> bool:
    """Whether a config group has inputs."""
    return any(group.fields("input_activations") for group in fields.maps("config_groups").values())


def _cache(fields: Fields) -> str:
    """How the KV cache is quantized: "fp8", another word, or ""."""
    for name in ("kv_cache_scheme", "kv_cache_quant_algo"):
        found = fields.values.get(name)
        if isinstance(found, str):
            return found.lower()
        if isinstance(found, dict) and found:
            scheme = fields.fields(name)
            eight = scheme.integer("num_bits", default=0) == 8 and scheme.word("type") == "float"
            return "fp8" if eight else "other"
    return ""


def _unknown(algorithm: str) -> str:
    return f"quant_algo {algorithm or 'missing'} (read here: {', '.join(ALGORITHMS)}, {MIXED})"
