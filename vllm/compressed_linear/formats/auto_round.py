# SPDX-License-Identifier: Apache-2.0
"""AutoRound (auto_round ``export`` modules): integers in GPTQ's or AWQ's layout, and the other
exports of ``auto_round_floats``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from vllm.compressed_linear.formats.auto_round_floats import float_scheme, is_float
from vllm.compressed_linear.formats.awq import awq_gemm_scheme, checked_group
from vllm.compressed_linear.formats.base import Format, Hints, register_format
from vllm.compressed_linear.formats.entries import Entries, ModuleNames
from vllm.compressed_linear.formats.expressions import is_expression
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.formats.group_size import SIZES, group_size_on_disk
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.scheme import CheckpointScheme

GPTQ_VERSIONS = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto": "gptq",
    "auto_gptq": "gptq",
}
"""packing_format → GPTQ version, which says whether zero points are stored minus 1."""
AWQ_PACKINGS = ("auto_round:auto_awq", "auto_awq", "auto_round:awq")
ROTATIONS = ("rotation_config", "hadamard_config", "spinquant_config")
"""Fields of models whose weights were rotated (auto_round ``inference/convert_model.py``)."""
DEFAULT_PACKING = "auto_round:auto_gptq"
"""Default of packing_format."""


class ExtraConfig(Entries):
    """``extra_config``: module names, ends of them, or expressions that are searched in them.

    Renaming may break an expression, so entries are also compared as they were written.
    """

    def keeps(self, spelling: str) -> bool:
        return True

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        return any(spelling in _ends(name) for name in names) or self._searched(spelling, names)

    def deciding(self, names: Sequence[str], modules: Iterable[str]) -> str | None:
        """The entry, as written, that applies to a module: exact names have precedence over ends,
        and these over expressions, in their order. An entry that names one of the file's
        ``modules`` is not an expression."""
        fused = names.fused if isinstance(names, ModuleNames) else ()
        ends = [_ends(name) for name in (*names, *fused)]
        for spelling in (*(e[0] for e in ends), *(end for e in ends for end in e[1:])):
            if spelling in self.spellings:
                return self.spellings[spelling]
        for spelling, entry in self.spellings.items():
            if spelling not in modules and self.select(spelling, names, None):
                return entry
        return None

    def _searched(self, spelling: str, names: Sequence[str]) -> bool:
        """Whether a name contains a match; an invalid expression is skipped, as in the tool."""
        if not is_expression(spelling):
            return False
        return self.expressions.matches(spelling, names, spelling, search=True)


class Blocks(Entries):
    """``block_name_to_quantize``: beginnings of module names."""

    def keeps(self, spelling: str) -> bool:
        return True

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        return any(name.startswith(spelling) for name in names)


@register_format("auto-round", "intel/auto-round")
@dataclass(frozen=True)
class AutoRound(Format):
    """``quant_method: auto-round``. ``floats``: it is one of the exports of ``auto_round_floats``.

    ``extra``: the entries of ``extra_config`` that override settings of modules, which are in
    ``overrides``; 16 bits means unquantized. Modules outside of ``blocks`` are unquantized, unless
    the file says otherwise (auto_round ``inference/convert_model.py``, ``inference/utils.py``).
    """

    aliases = ("inc", "auto-round", "auto_round")
    vllm_name = "inc"
    marker_tensors = ("qweight", "weight_packed")

    bits: int
    group_size: int | None
    packing: str
    symmetric: bool
    extra: ExtraConfig
    overrides: dict[str, Fields]
    blocks: Blocks
    floats: bool = False

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        packing = _packing(fields)
        floats = is_float(fields, packing)
        for field in ROTATIONS:
            if config.get(field):
                raise ConfigError(
                    f"quantization_config.{field}: AutoRound rotated the weights, and inputs must "
                    "be rotated while the model runs, which neither this package nor vLLM does; "
                    "quantize the model again without"
                )
        packing = packing or DEFAULT_PACKING
        bits = fields.integer("bits")
        group_size = -1 if floats else fields.optional_integer("group_size")
        if not floats and packing not in (*GPTQ_VERSIONS, *AWQ_PACKINGS):
            raise ConfigError(
                f"packing_format {packing!r} "
                f"(supported: {', '.join((*GPTQ_VERSIONS, *AWQ_PACKINGS))})"
            )
        overrides = fields.maps("extra_config")
        field = "block_name_to_quantize"
        field = field if config.get(field) else "to_quant_block_names"
        blocks = Blocks.of(field, _at_commas(fields.names(field)))
        extra = ExtraConfig.of("extra_config", overrides)
        symmetric = bool(fields.flag("sym"))
        return cls(config, bits, group_size, packing, symmetric, extra, overrides, blocks, floats)

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        fields = Fields(config)
        packing = _packing(fields)
        data_type = fields.word("data_type") or "int"
        if is_float(fields, packing):
            found = float_scheme(fields, "", FileView())
            return f"AutoRound with {found}" if isinstance(found, str) else None
        packing = packing or DEFAULT_PACKING
        if packing not in (*GPTQ_VERSIONS, *AWQ_PACKINGS) or not data_type.startswith("int"):
            return f"AutoRound packing {packing} of {data_type}"
        if fields.integer("act_bits", default=16) < 16:
            return "AutoRound with quantized activations"
        return None

    def delegated(self) -> tuple[str | None, dict[str, Any]]:
        """As GPTQ or AWQ, whose tensors these are: vLLM's class for AutoRound has no experts."""
        if self.floats:
            return self.vllm_name, self.config
        if self.packing in AWQ_PACKINGS:
            kept = [entry for entry, o in self.overrides.items() if _is_unquantized(o)]
            return "auto_awq", {
                "quant_method": "awq",
                "version": "gemm",
                "zero_point": not self.symmetric,
                "bits": self.bits,
                "group_size": self.group_size or SIZES[0],
                "modules_to_not_convert": kept,
            }
        return "auto_gptq", {
            "quant_method": "gptq",
            "checkpoint_format": GPTQ_VERSIONS[self.packing],
            "bits": self.bits,
            "group_size": self.group_size or SIZES[0],
            "sym": self.symmetric,
            "desc_act": False,
            "dynamic": self._dynamic(),
        }

    def _dynamic(self) -> dict[str, dict[str, Any]]:
        """``extra_config`` as GPTQModel's ``dynamic``: an expert's entry is one of its layer."""
        rules: dict[str, dict[str, Any]] = {}
        for entry, override in self.overrides.items():
            layer = re.split(r"(?<=\.experts)\.\d+\.", entry)[0]
            plain = re.fullmatch(r"[\w.]+", layer)
            # Models have other names before those of their layers.
            name = re.escape(layer[max(layer.find("layers."), 0) :]) if plain else layer
            sign = "-:" if _is_unquantized(override) else "+:"
            rules.setdefault(
                f"{sign}.*{name}$" if plain else f"{sign}.*{name}", dict(override.values)
            )
        return rules

    def hints(self) -> Hints:
        return Hints(symmetric=self.symmetric)

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        if kind is LayerKind.EMBEDDING:
            return Unquantized("AutoRound does not quantize embeddings")
        names = file.names_of(module)
        entry = self.extra.deciding(names, file.modules)
        override = Fields({}) if entry is None else self.overrides[entry]
        bits = override.integer("bits", default=self.bits)
        if bits >= 16:
            rule = "" if entry is None else f"extra_config {entry}: "
            return Unquantized(f"{rule}{bits} bits")
        if (found := file.unquantized_on_disk(module)) is not None:
            return found
        if entry is None and not file.quantized_on_disk(module):
            if self.blocks and self.blocks.first(names) is None:
                return Unquantized("outside of block_name_to_quantize")
            if not self.blocks and kind is LayerKind.HEAD:
                return Unquantized("lm_head is not quantized")
        if self.floats:
            merged = Fields({**self.config, **override.values})
            scheme = float_scheme(merged, module, file)
            if isinstance(scheme, str):
                return Delegated(f"AutoRound with {scheme}")
            return scheme
        group_size = override.optional_integer("group_size")
        if group_size is None:
            group_size = self.group_size
        try:
            scheme_of = self._integers(bits, override)
            if group_size is None:
                group_size = group_size_on_disk(module, file, scheme_of)
            return scheme_of(group_size)
        except ConfigError as error:
            raise ConfigError(f"{module}: {error}") from None

    def _integers(self, bits: int, override: Fields) -> Callable[[int], CheckpointScheme]:
        """From the size of groups to the scheme."""
        sym = override.flag("sym")
        symmetric = "sym: true" if (self.symmetric if sym is None else sym) else ""
        if self.packing not in AWQ_PACKINGS:
            version = GPTQ_VERSIONS[self.packing]
            return partial(gptq_scheme, bits, version=version, symmetric=symmetric)
        if bits != 4:
            raise ConfigError(f"AWQ packing with {bits} bits (supported: 4)")
        return lambda size: awq_gemm_scheme(checked_group(size), symmetric=symmetric)


def _packing(fields: Fields) -> str:
    """``packing_format``, or what early releases called ``backend``; empty if neither says one."""
    backend = fields.word("backend")
    if (packing := fields.word("packing_format")) or backend in ("", "auto"):
        return packing
    if backend in (*GPTQ_VERSIONS, *AWQ_PACKINGS):
        return backend
    return AWQ_PACKINGS[0] if "awq" in backend else DEFAULT_PACKING


def _is_unquantized(override: Fields) -> bool:
    return override.integer("bits", default=0) >= 16


def _ends(name: str) -> list[str]:
    """``a.b.c`` → ``a.b.c``, ``b.c``, ``c``."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _at_commas(names: list[str]) -> list[str]:
    return [part.strip() for name in names for part in name.split(",") if part.strip()]
