# SPDX-License-Identifier: Apache-2.0
"""AutoRound's integer exports, which use GPTQ's or AWQ's layout (auto_round ``export`` modules)."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from vllm.compressed_linear.formats.awq import awq_gemm_scheme
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.formats.resolution import LayerKind, Resolution, Unquantized
from vllm.compressed_linear.integration.config import (
    CompressedLinearConfig,
    ConfigError,
    register_format,
)

GPTQ_VERSIONS = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto": "gptq",
    "auto_gptq": "gptq",
}
"""packing_format → GPTQ version: who stores zero points less one."""
AWQ_PACKINGS = ("auto_round:auto_awq", "auto_awq", "auto_round:awq")
DEFAULT_PACKING = "auto_round:auto_gptq"
"""What a configuration without packing_format means."""


@register_format("auto-round", "intel/auto-round")
class AutoRoundConfig(CompressedLinearConfig):
    """``quant_method: auto-round`` with an integer packing.

    ``extra_config`` maps module names, or regular expressions that are searched in them, to
    overrides; exact names go first, then the expressions in their order; 16 bits means unquantized.
    Modules whose names do not begin with one of ``block_name_to_quantize`` are unquantized, unless
    the file says otherwise (auto_round ``inference/convert_model.py``, ``inference/utils.py``).
    """

    aliases = ("inc", "auto-round", "auto_round")
    vllm_name = "inc"
    codes_tensors = ("qweight",)

    bits: int
    group_size: int
    packing: str
    extra: dict[str, dict[str, Any]]
    _compiled: list[tuple[str, re.Pattern[str]]] | None = None
    blocks: list[str]

    @classmethod
    def parse(cls, config: dict[str, Any]) -> AutoRoundConfig:
        self = cls(config)
        self.bits = self.require("bits", int)
        self.group_size = self.require("group_size", int)
        self.packing = str(config.get("packing_format") or DEFAULT_PACKING)
        if self.packing not in (*GPTQ_VERSIONS, *AWQ_PACKINGS):
            raise ConfigError(
                f"packing_format {self.packing!r} "
                f"(supported: {', '.join((*GPTQ_VERSIONS, *AWQ_PACKINGS))})"
            )
        self.extra = config.get("extra_config") or {}
        blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names")
        self.blocks = _block_names(blocks)
        return self

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        packing = str(config.get("packing_format") or DEFAULT_PACKING)
        data_type = str(config.get("data_type") or "int")
        if packing not in (*GPTQ_VERSIONS, *AWQ_PACKINGS) or not data_type.startswith("int"):
            return f"AutoRound packing {packing} of {data_type}"
        if int(config.get("act_bits") or 16) < 16:
            return "AutoRound with quantized activations"
        return None

    def map_names(self, rename: Any) -> None:
        # Entries under the checkpoint's names stay: renaming may break an expression.
        self.extra = {**rename.apply_dict(self.extra), **self.extra}
        self.blocks = [*rename.apply_list(self.blocks), *self.blocks]

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        if kind is LayerKind.EMBEDDING:
            return Unquantized("AutoRound leaves embeddings alone")
        entry, override = self._override(module)
        bits = self._number(entry, override, "bits", self.bits)
        if bits >= 16:
            return Unquantized(f"extra_config {entry}: {bits} bits")
        if (found := self.unquantized_on_disk(module)) is not None:
            return found
        if not entry and not self.quantized_on_disk(module):
            if self.blocks and not any(
                name.startswith(block) for block in self.blocks for name in self.names_of(module)
            ):
                return Unquantized("outside of block_name_to_quantize")
            if not self.blocks and kind is LayerKind.HEAD:
                return Unquantized("lm_head is not quantized")
        group_size = self._number(entry, override, "group_size", self.group_size)
        try:
            if self.packing not in AWQ_PACKINGS:
                return gptq_scheme(bits, group_size, version=GPTQ_VERSIONS[self.packing])
        except ConfigError as error:
            raise ConfigError(f"{module}: {error}") from None
        if bits != 4:
            raise ConfigError(f"{module}: AWQ packing with {bits} bits (supported: 4)")
        return awq_gemm_scheme(group_size, zero_point=True)

    def _override(self, module: str) -> tuple[str, dict[str, Any]]:
        """The entry of ``extra_config`` that decides, and what it says; ("", {}) if none does."""
        names = self.names_of(module)
        for name in names:
            if name in self.extra:
                return name, self.extra[name]
        for name in names:
            while name:
                name = name.partition(".")[2]
                if name in self.extra:
                    return name, self.extra[name]
        for entry, pattern in self._expressions():
            if any(pattern.search(name) for name in names):
                return entry, self.extra[entry]
        return "", {}

    def _expressions(self) -> list[tuple[str, re.Pattern[str]]]:
        """Entries that name no module of the file, compiled; the tool skips what does not."""
        if self._compiled is None:
            modules = self.headers.modules if self.headers is not None else {}
            self._compiled = []
            for entry in self.extra:
                with suppress(re.error):
                    if entry not in modules:
                        self._compiled.append((entry, re.compile(entry)))
        return self._compiled

    @staticmethod
    def _number(entry: str, override: dict[str, Any], key: str, default: int) -> int:
        value = override.get(key)
        if value is None:
            return default
        try:
            return int(value)
        except (TypeError, ValueError):
            raise ConfigError(f"extra_config {entry}: {key} is {value!r}, expected int") from None


def _block_names(blocks: Any) -> list[str]:
    """A comma-separated text, a list, or a list of lists of names → list of names."""
    if blocks is None:
        return []
    if isinstance(blocks, str):
        return [name.strip() for name in blocks.split(",") if name.strip()]
    return [name for block in blocks for name in _block_names(block)]
