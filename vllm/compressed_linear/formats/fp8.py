# SPDX-License-Identifier: Apache-2.0
"""``quant_method: fp8``: weights in e4m3 (or e5m2) with scales per tensor, channel or block.

Written by DeepSeek's and Qwen's releases, AutoFP8, transformers (``FineGrainedFP8Config``) and
GPTQModel. ``weight_scale_inv`` is a factor in spite of its name (DeepSeek-V3,
``README_WEIGHTS.md``); GPTQModel's is a divisor and says so (``weight_scale_semantics``).

x is quantized as vLLM does: per tensor with a scale of the file, per token, or with blocks per
group of channels. ``scale_fmt: ue8m0`` (DeepSeek-V3.1, ``inference/kernel.py``) rounds the scales
of such groups up to powers of two. GPTQModel does not quantize x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from vllm.compressed_linear.formats.base import Format, quant_method_of, register_format
from vllm.compressed_linear.formats.entries import Components
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.float8 import (
    PER_TOKEN,
    STATIC,
    Names,
    float8_scheme,
    has_input_scale,
    per_group,
)
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.descriptor import ActivationSpec

BLOCKS = Names(("weight_scale_inv", "weight_scale", "scale"), ("input_scale", "activation_scale"))
PLAIN = Names(("weight_scale", "weight_scale_inv", "scale"), ("input_scale", "activation_scale"))
SCHEMES = ("static", "dynamic", "")


@register_format("fp8", "deepseek_v4_fp8")
@dataclass(frozen=True)
class Fp8(Format):
    """``activation``: "static", "dynamic", "none", or "" for what the file has a scale for.
    ``ignored``: see ``left_out``."""

    aliases = ("fp8",)
    marker_tensors = ("weight_scale_inv", "weight_scale", "scale")

    activation: str
    block: tuple[int, int] | None
    powers_of_two: bool
    inverse: bool
    ignored: Components

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        if (why := cls.unsupported(config)) is not None:
            raise ConfigError(why)
        scheme = fields.word("activation_scheme")
        semantics = fields.word("weight_scale_semantics")
        if semantics not in ("", "inverse", "multiply", "direct"):
            raise ConfigError(
                f"{fields.where}.weight_scale_semantics is {semantics!r}, expected inverse, or no "
                "such field where scales are factors"
            )
        if not scheme and fields.word("method"):
            scheme = "none"  # GPTQModel, which repeats quant_method so
        field = "ignored_layers" if config.get("ignored_layers") else "modules_to_not_convert"
        return cls(
            config,
            scheme,
            _block(fields),
            powers_of_two=fields.word("scale_fmt") == "ue8m0",
            inverse=semantics == "inverse",
            ignored=Components.of(field, fields.names(field)),
        )

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        fields = Fields(config)
        if experts := fields.word("routed_experts_quant_method"):
            # Ling: its class renames and describes such experts for vLLM's own config only.
            return f"experts as {experts} (routed_experts_quant_method), for vLLM's own config only"
        scheme = fields.word("activation_scheme")
        if scheme in SCHEMES:
            return None
        return f"{fields.where}.activation_scheme is {scheme!r}, expected static or dynamic"

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        if (plain := left_out("fp8", self.ignored, module, kind, file)) is not None:
            return plain
        return float8_scheme(
            module,
            file,
            BLOCKS if self.block else PLAIN,
            self._activation(module, file),
            block=self.block,
            reciprocal=self.inverse,
        )

    def _activation(self, module: str, file: FileView) -> ActivationSpec | None:
        if self.activation == "none":
            return None
        static = self.activation == "static"
        if not self.activation:
            static = has_input_scale(module, file, PLAIN) is True
        if static:
            return STATIC
        if self.block:
            return per_group(self.block[1], powers_of_two=self.powers_of_two)
        return PER_TOKEN

    def has_attention_scales(self, file: FileView) -> bool:
        return file.has_attention_scales()

    def delegated(self) -> tuple[str | None, dict[str, Any]]:
        scheme = self.activation if self.activation in ("static", "dynamic") else "dynamic"
        # vLLM calls it otherwise for DeepSeek-V4, whose experts may be of another kind.
        return quant_method_of(self.config), {**self.config, "activation_scheme": scheme}

    def misread_by_vllm(self) -> str:
        return "scales are divisors here (weight_scale_semantics), and factors there" * self.inverse


def left_out(
    quant_method: str, entries: Components, module: str, kind: LayerKind, file: FileView
) -> Unquantized | None:
    """Why a module is not quantized; None if it is. Codes in the file are contradicted only by an
    entry of the module's full name; vLLM does not look at parts of names."""
    if (found := file.unquantized_on_disk(module)) is not None:
        return found
    names, quantized = file.names_of(module), file.quantized_on_disk(module)
    entry = entries.first(names)
    if entry is not None and (not quantized or entries.names_fully(names)):
        return Unquantized(f"{entries.field}: {entry}")
    if kind is not LayerKind.LINEAR and not quantized:
        return Unquantized(f"{quant_method} is for linear layers")
    return None


def _block(fields: Fields) -> tuple[int, int] | None:
    """``weight_block_size``; None if scales are not per block."""
    sizes = fields.integers("weight_block_size")
    if not sizes:
        return None
    if len(sizes) != 2 or min(sizes) < 1:
        raise ConfigError(
            f"{fields.where}.weight_block_size is {sizes}, expected two positive numbers (rows and "
            "channels)"
        )
    return sizes[0], sizes[1]
