# SPDX-License-Identifier: Apache-2.0
"""AutoRound's integer exports, which use GPTQ's or AWQ's layout (auto_round ``export`` modules)."""

from __future__ import annotations

import re
from typing import Any

from vllm.compressed_linear.config import CompressedLinearConfig, ConfigError, register_format
from vllm.compressed_linear.formats.awq import awq_gemm_scheme
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.resolution import LayerKind, Resolution, Unquantized

GPTQ_VERSIONS = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_gptq": "gptq",
}
"""packing_format → GPTQ version: who stores zero points less one."""
AWQ_PACKINGS = ("auto_round:auto_awq", "auto_awq", "auto_round:awq")


@register_format("auto-round", "intel/auto-round")
class AutoRoundConfig(CompressedLinearConfig):
    """``quant_method: auto-round`` with an integer packing.

    ``extra_config`` maps module names, or regular expressions over them, to overrides; 16 bits
    means unquantized. Modules outside ``block_name_to_quantize`` are unquantized.
    """

    aliases = ("inc", "auto-round", "auto_round")
    vllm_name = "inc"

    @classmethod
    def parse(cls, config: dict[str, Any]) -> AutoRoundConfig:
        self = cls(config)
        self.bits = self.require("bits", int)
        self.group_size = self.require("group_size", int)
        self.packing = str(config.get("packing_format") or "auto_round")
        if self.packing not in (*GPTQ_VERSIONS, *AWQ_PACKINGS):
            raise ConfigError(
                f"packing_format {self.packing!r} "
                f"(supported: {', '.join((*GPTQ_VERSIONS, *AWQ_PACKINGS))})"
            )
        self.symmetric = bool(config.get("sym", True))
        self.extra: dict[str, dict[str, Any]] = config.get("extra_config") or {}
        blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names")
        self.blocks = _block_names(blocks)
        return self

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        packing = str(config.get("packing_format") or "auto_round")
        data_type = str(config.get("data_type") or "int")
        if packing not in (*GPTQ_VERSIONS, *AWQ_PACKINGS) or not data_type.startswith("int"):
            return f"AutoRound packing {packing} of {data_type}"
        if int(config.get("act_bits") or 16) < 16:
            return "AutoRound with quantized activations"
        return None

    def map_names(self, rename: Any) -> None:
        self.extra = rename.apply_dict(self.extra)
        self.blocks = rename.apply_list(self.blocks)

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        if kind is LayerKind.EMBEDDING:
            return Unquantized("AutoRound leaves embeddings alone")
        override = self._override(module)
        inside = not self.blocks or any(block in module for block in self.blocks)
        if override is None and (kind is LayerKind.HEAD or not inside):
            return Unquantized("outside of block_name_to_quantize")
        override = override or {}
        bits = int(override.get("bits", self.bits))
        if bits >= 16:
            return Unquantized("extra_config gives it 16 bits")
        if (found := self.unquantized_on_disk(module, "qweight")) is not None:
            return found
        group_size = int(override.get("group_size", self.group_size))
        if self.packing in AWQ_PACKINGS:
            if bits != 4:
                raise ConfigError(f"{module}: AWQ packing with {bits} bits (supported: 4)")
            return awq_gemm_scheme(group_size, zero_point=True)
        return gptq_scheme(bits, group_size, version=GPTQ_VERSIONS[self.packing])

    def _override(self, module: str) -> dict[str, Any] | None:
        if module in self.extra:
            return self.extra[module]
        for pattern, override in self.extra.items():
            if any(sign in pattern for sign in "*+?[(|^$\\") and re.search(pattern, module):
                return override
        return None


def _block_names(blocks: Any) -> list[str]:
    """A comma-separated text, a list, or a list of lists of names → list of names."""
    if blocks is None:
        return []
    if isinstance(blocks, str):
        return [name.strip() for name in blocks.split(",") if name.strip()]
    return [name for block in blocks for name in _block_names(block)]
