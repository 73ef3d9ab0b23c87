# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: integer weights in ``pack-quantized`` form.

Layout: compressed_tensors ``compressors/pack_quantized``; releases before 0.18 pack 3, 5, 6 and 7
bits without straddling words, later ones densely, under the same names: the width tells.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.compressed_linear.formats.resolution import Delegated, LayerKind, Resolution, Unquantized
from vllm.compressed_linear.integration.config import (
    CompressedLinearConfig,
    ConfigError,
    register_format,
)
from vllm.compressed_linear.spec.descriptor import ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

MODULE_CLASS = {
    LayerKind.LINEAR: "Linear",
    LayerKind.HEAD: "Linear",
    LayerKind.EMBEDDING: "Embedding",
}
"""Class that the module had when it was quantized, for targets that name classes."""

DENSE_SINCE = (0, 18)


def pack_quantized_scheme(
    bits: int, group_size: int, *, symmetric: bool, group_index: bool, dense_first: bool = True
) -> CheckpointScheme:
    """Layout of one pack-quantized weight; ``group_size`` −1 means one scale per channel."""
    if bits not in range(1, 9):
        raise ConfigError(f"pack-quantized weights with {bits} bits (supported: 1 to 8)")

    def packings(axis: str) -> tuple[Packing, tuple[Packing, ...]]:
        both = (Packing(bits, axis), Packing(bits, axis, dense=False))
        if 32 % bits == 0:
            return both[0], ()
        return (both[0], both[1:]) if dense_first else (both[1], both[:1])

    codes, other_codes = packings("K")
    zeros, other_zeros = packings("N")
    tensors = [
        StoredTensor("weight_packed", Role.CODES, "int32", ("N", "K"), codes, other_codes),
        StoredTensor("weight_scale", Role.SCALE, "float32", ("N", "G")),
        StoredTensor("weight_shape", Role.SHAPE, "int64", (2,), optional=True),
    ]
    if not symmetric:
        tensors.append(
            StoredTensor("weight_zero_point", Role.ZERO, "int32", ("N", "G"), zeros, other_zeros)
        )
    if group_index:
        tensors.append(
            StoredTensor("weight_g_idx", Role.GROUP_INDEX, "int32", ("K",), optional=True)
        )
    scale = ScaleSpec("bfloat16", "channel" if group_size == -1 else "group", group_size)
    if symmetric:
        return CheckpointScheme(WeightSpec(uint(bits, 1 << (bits - 1)), scale), tuple(tensors))
    zero = ZeroSpec("integer", "uint8")
    return CheckpointScheme(WeightSpec(uint(bits), scale, zero), tuple(tensors))


@dataclass
class _Group:
    """One entry of ``config_groups``."""

    name: str
    targets: list[str]
    resolution: Resolution


@register_format("compressed-tensors")
class CompressedTensorsConfig(CompressedLinearConfig):
    """``config_groups`` with targets (names, ``re:`` regexes, classes) and an ignore list
    (compressed_tensors ``utils/match.py``, ``quantization/lifecycle/apply.py``)."""

    aliases = ("compressed-tensors",)
    vllm_name = "compressed-tensors"
    codes_tensors = ("weight_packed",)

    ignore: list[str]
    groups: list[_Group]

    @classmethod
    def parse(cls, config: dict[str, Any]) -> CompressedTensorsConfig:
        self = cls(config)
        self.ignore = list(config.get("ignore") or ())
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ConfigError("compressed-tensors: config_groups is missing or empty")
        self.groups = [
            _Group(name, list(group.get("targets") or ()), _group_resolution(name, group, config))
            for name, group in groups.items()
        ]
        return self

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        groups = config.get("config_groups") or {}
        found = [_group_resolution(n, g, config) for n, g in groups.items()]
        if any(isinstance(r, CheckpointScheme) for r in found):
            return None
        reasons = [r.reason for r in found if isinstance(r, Delegated)]
        return "; ".join(reasons) or "compressed-tensors without config_groups"

    def map_names(self, rename: Any) -> None:
        self.ignore = _renamed(self.ignore, rename)
        for group in self.groups:
            group.targets = _renamed(group.targets, rename)

    def has_attention_scales(self) -> bool:
        return bool(self.config.get("kv_cache_scheme"))

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        module_class = MODULE_CLASS[kind]
        names = self.names_of(module)
        for entry in self.ignore:
            if _matches(entry, names) or entry == module_class:
                return Unquantized(f"ignore: {entry}")
        group = self._group(names, module_class)
        if group is None:
            return Unquantized("no config group targets it")
        quantized = isinstance(group.resolution, CheckpointScheme)
        return (self.unquantized_on_disk(module) if quantized else None) or group.resolution

    def _group(self, names: Sequence[str], module_class: str) -> _Group | None:
        """The group that the library's ``match_targets`` would choose: names go before regexes,
        these in the order of their text, and both before classes; of groups with the same target
        the last one."""
        by_target = {target: group for group in self.groups for target in group.targets}
        for target in sorted(by_target, key=lambda target: (target.startswith("re:"), target)):
            if _matches(target, names):
                return by_target[target]
        return by_target.get(module_class)


def _renamed(entries: list[str], rename: Any) -> list[str]:
    """Entries under vLLM's names. Regexes are kept as they were too: renaming a text may break the
    expression, which modules' names in the checkpoint still match."""
    renamed = rename.apply_list(entries)
    return [*renamed, *(e for e in entries if e.startswith("re:") and e not in renamed)]


def _matches(target: str, names: Sequence[str]) -> bool:
    if target.startswith("re:"):
        return any(re.match(target[3:], name) for name in names)
    return target in names


def _group_resolution(name: str, group: dict[str, Any], config: dict[str, Any]) -> Resolution:
    """Our scheme for one config group, or why vLLM's own code has to run it."""
    weights = group.get("weights") or {}
    form = group.get("format") or config.get("format") or "pack-quantized"
    if not weights:
        return Unquantized(f"config group {name} has no weights entry")
    reasons = []
    if form != "pack-quantized":
        reasons.append(f"format {form}")
    if weights.get("type", "int") != "int":
        reasons.append(f"{weights.get('type')} weights")
    if group.get("input_activations"):
        reasons.append("quantized activations")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        reasons.append(f"strategy {strategy}")
    if (config.get("transform_config") or {}).get("config_groups"):
        reasons.append("transforms")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format") not in (None, "dense"):
        reasons.append(f"sparsity {sparsity.get('format')}")
    if reasons:
        return Delegated(f"compressed-tensors {name}: {', '.join(reasons)}")
    group_size = -1 if strategy == "channel" else weights.get("group_size")
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size == 0:
        raise ConfigError(
            f"compressed-tensors {name}: group_size {group_size!r}, expected a number"
        )
    bits = weights.get("num_bits")
    if not isinstance(bits, int):
        raise ConfigError(f"compressed-tensors {name}: num_bits {bits!r}, expected a number")
    return pack_quantized_scheme(
        bits,
        group_size,
        symmetric=bool(weights.get("symmetric", True)),
        group_index=weights.get("actorder") not in (None, False, "weight", "static"),
        dense_first=_version(config.get("version")) >= DENSE_SINCE,
    )


def _version(text: Any) -> tuple[int, ...]:
    """Leading numbers of a version; an unknown one counts as current."""
    found = re.match(r"(\d+)\.(\d+)", str(text or ""))
    return (int(found[1]), int(found[2])) if found else DENSE_SINCE
