# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: integer weights in ``pack-quantized`` form.

Layout: compressed_tensors ``compressors/pack_quantized``; releases before 0.18 pack 3, 5, 6 and 7
bits without straddling words, later ones densely, under the same names; the stored width decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from vllm.compressed_linear.formats.base import Format, Hints, register_format
from vllm.compressed_linear.formats.entries import Entries
from vllm.compressed_linear.formats.fields import Fields
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

PACK_QUANTIZED = "pack-quantized"
DENSE_SINCE = (0, 18)


class ZeroForm(StrEnum):
    """How ``weight_zero_point`` is stored. ``SIGNED``: by early releases, one signed integer for
    each zero point; ``UNKNOWN``: packed or signed, which the shape tells."""

    NONE = ""
    PACKED = "packed"
    SIGNED = "signed"
    UNKNOWN = "unknown"


def pack_quantized_scheme(
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    group_index: bool,
    dense_first: bool = True,
    zeros: ZeroForm | None = None,
) -> CheckpointScheme:
    """Layout of one pack-quantized weight; ``group_size`` −1 means one scale per channel.

    ``zeros``: how zero points are stored; by default packed, and a symmetric weight has none.
    """
    if bits not in range(1, 9):
        raise ConfigError(f"pack-quantized weights with {bits} bits (supported: 1 to 8)")
    if zeros is None:
        zeros = ZeroForm.NONE if symmetric else ZeroForm.PACKED

    def packings(axis: str) -> tuple[Packing, ...]:
        both = (Packing(bits, axis), Packing(bits, axis, dense=False))
        if 32 % bits == 0:
            return both[:1]
        return both if dense_first else both[::-1]

    codes = packings("K")
    tensors = [
        StoredTensor("weight_packed", Role.CODES, "int32", ("N", "K"), codes[0], codes[1:]),
        StoredTensor("weight_scale", Role.SCALE, "float32", ("N", "G")),
        StoredTensor("weight_shape", Role.SHAPE, "int64", (2,), optional=True),
    ]
    if zeros is not ZeroForm.NONE:
        forms = packings("N") if zeros is not ZeroForm.SIGNED else ()
        if zeros is not ZeroForm.PACKED:
            forms = (*forms, Packing(bits, "N", signed=True, single=True))
        tensors.append(
            StoredTensor(
                *("weight_zero_point", Role.ZERO, "int32", ("N", "G"), forms[0], forms[1:]),
                optional=symmetric,
            )
        )
    if group_index:
        tensors.append(
            StoredTensor("weight_g_idx", Role.GROUP_INDEX, "int32", ("K",), optional=True)
        )
    scale = ScaleSpec("bfloat16", "channel" if group_size == -1 else "group", group_size)
    if zeros is ZeroForm.NONE:
        return CheckpointScheme(WeightSpec(uint(bits, 1 << (bits - 1)), scale), tuple(tensors))
    return CheckpointScheme(
        WeightSpec(uint(bits), scale, ZeroSpec("integer", "uint8")),
        tuple(tensors),
        symmetric="symmetric: true" if symmetric else "",
    )


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

    def matching(self, names: Sequence[str], kind: LayerKind) -> list[str]:
        """The targets, as written, that select a module, in vLLM's order: names and expressions as
        the configuration lists them, then classes. The library has another one (names, expressions
        in the order of their text), so tensors of the files decide where they can."""
        found = [entry for s, entry in self.spellings.items() if self.select(s, names, None)]
        if (name := MODULE_CLASS[kind]) in self.spellings:
            found.append(self.spellings[name])
        return list(dict.fromkeys(found))

    def classes(self) -> list[str]:
        """Targets that may be names of classes."""
        return [s for s in self.spellings if s.isidentifier() and s[0].isupper()]


@dataclass(frozen=True)
class Group:
    """One of ``config_groups``. ``reason``: why its modules are left to vLLM or not quantized;
    ``refusal``: why they cannot run at all."""

    name: str
    weighted: bool = True
    bits: int = 0
    group_size: int = -1
    symmetric: bool = True
    group_index: bool = False
    dense_first: bool = True
    reason: str = ""
    refusal: str = ""

    def resolve(self, module: str, file: FileView) -> Resolution:
        """What it says of one of its modules. The file tells how zero points are stored."""
        if self.reason:
            return Delegated(self.reason) if self.weighted else Unquantized(self.reason)
        stored = file.tensors_on_disk(module)
        self._check_order(module, stored)
        zeros = ZeroForm.UNKNOWN
        if stored is not None:
            zeros = _zeros_on_disk(module, file)
            if zeros is ZeroForm.NONE and not self.symmetric:
                zeros = ZeroForm.PACKED
        elif self.symmetric and file.headers is not None:
            zeros = ZeroForm.NONE
        return pack_quantized_scheme(
            self.bits,
            self.group_size,
            symmetric=self.symmetric,
            # Whatever the configuration says, an order that is there counts.
            group_index=self.group_index or stored is None or "weight_g_idx" in stored,
            dense_first=self.dense_first,
            zeros=zeros,
        )

    def _check_order(self, module: str, stored: set[str] | None) -> None:
        """Raise ``ConfigError`` if channels were reordered and the file does not say how."""
        if stored is None or not self.group_index or self.group_size == -1:
            return
        if "weight_packed" in stored and "weight_g_idx" not in stored:
            raise ConfigError(
                f"{module}: actorder of {self.name} says that channels have the order of "
                f"weight_g_idx, but the file has no {module}.weight_g_idx; expected one, or "
                'actorder: "static" for channels in order'
            )


@register_format("compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors(Format):
    """``config_groups`` with targets and an ignore list
    (compressed_tensors ``utils/match.py``, ``quantization/lifecycle/apply.py``).

    ``groups``: target → groups that have it, the last one first, as it decides in the library. Of
    several groups for a module the one decides whose tensors the file has.
    """

    aliases = ("compressed-tensors",)
    vllm_name = "compressed-tensors"
    marker_tensors = ("weight_packed",)

    ignore: Targets
    targets: Targets
    groups: dict[str, tuple[Group, ...]]

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        found = _groups(fields)
        if not found:
            raise ConfigError("compressed-tensors: config_groups is missing or empty")
        by_target: dict[str, tuple[Group, ...]] = {}
        for group, targets in found:
            for target in targets:
                by_target[target] = (group, *by_target.get(target, ()))
        return cls(
            config,
            ignore=Targets.of("ignore", fields.names("ignore")),
            targets=Targets.of("targets", by_target),
            groups=by_target,
        )

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        found = [group for group, _ in _groups(Fields(config))]
        if any(group.refusal or not group.reason for group in found):
            return None
        reasons = [group.reason for group in found if group.weighted]
        return "; ".join(reasons) or "compressed-tensors without config_groups"

    def has_attention_scales(self, file: FileView) -> bool:
        return bool(self.config.get("kv_cache_scheme"))

    def kv_cache_scheme(self) -> dict[str, Any] | None:
        scheme: dict[str, Any] | None = self.config.get("kv_cache_scheme")
        return scheme or None

    def hints(self) -> Hints:
        # Here a group index means activation order; GPTQ files always have one.
        return Hints(reordered=True)

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        names = file.names_of(module)
        if (entry := self.ignore.first(names, kind)) is not None:
            return Unquantized(f"ignore: {entry}")
        targets = self.targets.matching(names, kind)
        if not targets and file.quantized_on_disk(module):
            # Which subclass of a layer was quantized is not known here.
            targets = self.targets.classes()
        groups = [group for target in targets for group in self.groups[target]]
        if not groups:
            return Unquantized("no config group targets it")
        chosen = _settled(groups, module, file)
        found = chosen.resolve(module, file)
        quantized = isinstance(found, CheckpointScheme)
        if quantized and (plain := file.unquantized_on_disk(module)) is not None:
            return plain
        if chosen.refusal:
            raise ConfigError(f"{module}: {chosen.refusal}")
        return found


def _settled(groups: Sequence[Group], module: str, file: FileView) -> Group:
    """The first of ``groups`` that the module's tensors fit; the first one if none does."""
    if all(group == groups[0] for group in groups) or file.headers is None:
        return groups[0]
    found = [(group, group.resolve(module, file)) for group in groups]
    fitting = [
        (group, resolution)
        for group, resolution in found
        if not isinstance(resolution, CheckpointScheme) or file.fits(module, resolution)
    ]
    # A symmetric weight may have zero points too, but an asymmetric one must.
    exact = [g for g, r in fitting if not (isinstance(r, CheckpointScheme) and r.symmetric)]
    return (exact or [group for group, _ in fitting] or list(groups))[0]


def _zeros_on_disk(module: str, file: FileView) -> ZeroForm:
    zeros, codes = (file.header(module, f"weight_{name}") for name in ("zero_point", "packed"))
    if zeros is None:
        return ZeroForm.NONE
    if codes is None or not zeros.shape:
        return ZeroForm.UNKNOWN
    return ZeroForm.SIGNED if zeros.shape[0] == codes.shape[0] else ZeroForm.PACKED


def _groups(config: Fields) -> list[tuple[Group, list[str]]]:
    """All groups with their targets, in the order of the configuration."""
    return [
        (_group(name, group, config), group.names("targets"))
        for name, group in config.maps("config_groups").items()
    ]


def _group(name: str, group: Fields, config: Fields) -> Group:
    weights = group.fields("weights")
    refusal = _refusal(name, group, config)
    if not weights:
        return Group(name, False, reason=f"config group {name} has no weights", refusal=refusal)
    form = group.word("format") or config.word("format") or PACK_QUANTIZED
    reasons = []
    if form != PACK_QUANTIZED:
        reasons.append(f"format {form}")
    if (kind := weights.word("type") or "int") != "int":
        reasons.append(f"{kind} weights")
    if group.fields("input_activations"):
        reasons.append("quantized activations")
    sized = weights.values.get("group_size") is not None
    strategy = weights.word("strategy") or ("group" if sized else "channel")
    if strategy not in ("group", "channel"):
        reasons.append(f"strategy {strategy}")
    if config.fields("transform_config").fields("config_groups"):
        reasons.append("transforms")
    if (sparsity := config.fields("sparsity_config").word("format")) not in ("", "dense"):
        reasons.append(f"sparsity {sparsity}")
    if reasons:
        reason = f"compressed-tensors {name}: {', '.join(reasons)}"
        return Group(name, reason=reason, refusal=refusal)
    group_size = -1 if strategy == "channel" else weights.integer("group_size")
    if group_size != -1 and group_size < 1:
        raise ConfigError(
            f"{weights.where}.group_size is {group_size}, expected -1 or a positive number"
        )
    symmetric = weights.flag("symmetric")
    order = weights.values.get("actorder")
    found = Group(
        name,
        bits=weights.integer("num_bits"),
        group_size=group_size,
        symmetric=True if symmetric is None else symmetric,
        group_index=order is True or (order not in (None, False) and _by_channel(weights)),
        dense_first=_version(config.values.get("version")) >= DENSE_SINCE,
        refusal=refusal,
    )
    found.resolve("", FileView())  # raises for widths that do not exist
    return found


def _refusal(name: str, group: Fields, config: Fields) -> str:
    """Why no layer of a group that quantizes outputs can run; empty if it does not, or vLLM can:
    integer weights between static 8-bit inputs and outputs (``CompressedTensorsWNA8O8Int``)."""
    output = group.fields("output_activations")
    if not output:
        return ""
    weights = group.fields("weights")
    form = group.word("format") or config.word("format") or PACK_QUANTIZED
    if (
        form in (PACK_QUANTIZED, "int-quantized")
        and (weights.word("type") or "int") == "int"
        and (weights.word("strategy") or "group") in ("group", "channel")
        and all(_static_int8(group.fields(f"{side}_activations")) for side in ("input", "output"))
    ):
        return ""
    when = "dynamic" if output.values.get("dynamic") else "static"
    return (
        f"{output.where} asks for {when} {output.integer('num_bits', default=8)}-bit "
        f"{output.word('type') or 'int'} outputs of the layer, which neither this package nor vLLM "
        "computes; set it to null to run the layer with outputs that are not quantized"
    )


def _static_int8(activations: Fields) -> bool:
    return (
        (activations.word("type") or "int") == "int"
        and activations.word("strategy") == "tensor"
        and activations.integer("num_bits", default=8) == 8
        and not activations.values.get("dynamic")
        and bool(activations)
    )


def _by_channel(weights: Fields) -> bool:
    """Whether ``actorder`` leaves groups of channels that are not next to each other."""
    return weights.word("actorder") not in ("weight", "static")


def _version(text: Any) -> tuple[int, ...]:
    """Leading numbers of a version; an unknown one is taken for the current one."""
    found = re.match(r"(\d+)\.(\d+)", str(text or ""))
    return (int(found[1]), int(found[2])) if found else DENSE_SINCE
