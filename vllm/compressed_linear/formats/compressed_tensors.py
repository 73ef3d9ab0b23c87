# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: integer weights in ``pack-quantized`` form.

Layout: compressed_tensors ``compressors/pack_quantized``; releases before 0.18 pack 3, 5, 6 and 7
bits without straddling words, later ones densely, under the same names; the stored width decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm.compressed_linear.formats.base import Format, Hints, register_format
from vllm.compressed_linear.formats.entries import Entries
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
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
"""Class of the module during quantization, for targets that name classes."""

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


class Targets(Entries):
    """Names of modules, ``re:`` and an expression that matches from their beginning, or classes.

    Renaming may break an expression, so expressions are also compared as they were written.
    """

    def keeps(self, spelling: str) -> bool:
        return spelling.startswith("re:")

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        if kind is not None and spelling == MODULE_CLASS[kind]:
            return True
        if spelling.startswith("re:"):
            return self.expressions.matches(spelling[3:], names, spelling)
        return spelling in names

    def deciding(self, names: Sequence[str], kind: LayerKind) -> str | None:
        """The target, as written, that the library's ``match_targets`` would choose: names have
        precedence over expressions (in the order of their text), and these over classes."""
        for spelling in sorted(self.spellings, key=lambda s: (s.startswith("re:"), s)):
            if self.selects(spelling, names, None):
                return self.spellings[spelling]
        return self.spellings.get(MODULE_CLASS[kind])


@register_format("compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors(Format):
    """``config_groups`` with targets and an ignore list
    (compressed_tensors ``utils/match.py``, ``quantization/lifecycle/apply.py``).

    ``groups``: target → resolution; the last of the groups with the same target.
    """

    aliases = ("compressed-tensors",)
    vllm_name = "compressed-tensors"
    marker_tensors = ("weight_packed",)

    ignore: Targets
    targets: Targets
    groups: dict[str, Resolution]

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ConfigError("compressed-tensors: config_groups is missing or empty")
        by_target: dict[str, Resolution] = {}
        for name, group in groups.items():
            resolution = _group_resolution(name, group, config)
            by_target |= dict.fromkeys(group.get("targets") or (), resolution)
        return cls(
            config,
            ignore=Targets.of("ignore", config.get("ignore") or ()),
            targets=Targets.of("targets", by_target),
            groups=by_target,
        )

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        groups = config.get("config_groups") or {}
        found = [_group_resolution(n, g, config) for n, g in groups.items()]
        if any(isinstance(r, CheckpointScheme) for r in found):
            return None
        reasons = [r.reason for r in found if isinstance(r, Delegated)]
        return "; ".join(reasons) or "compressed-tensors without config_groups"

    def has_attention_scales(self) -> bool:
        return bool(self.config.get("kv_cache_scheme"))

    def hints(self) -> Hints:
        # Here a group index means activation order; GPTQ files always have one.
        return Hints(reordered=True)

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        names = file.names_of(module)
        if (entry := self.ignore.first(names, kind)) is not None:
            return Unquantized(f"ignore: {entry}")
        target = self.targets.deciding(names, kind)
        if target is None:
            return Unquantized("no config group targets it")
        found = self.groups[target]
        quantized = isinstance(found, CheckpointScheme)
        return (file.unquantized_on_disk(module) if quantized else None) or found


def _group_resolution(name: str, group: dict[str, Any], config: dict[str, Any]) -> Resolution:
    """The scheme of one config group, or why it is left to vLLM's own code."""
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
    """Leading numbers of a version; an unknown one is taken for the current one."""
    found = re.match(r"(\d+)\.(\d+)", str(text or ""))
    return (int(found[1]), int(found[2])) if found else DENSE_SINCE
