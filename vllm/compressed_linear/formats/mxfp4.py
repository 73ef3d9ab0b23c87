# SPDX-License-Identifier: Apache-2.0
"""``quant_method: mxfp4`` of gpt-oss: experts in MXFP4, everything else in 16 bits.

vLLM's own config for it does not quantize linear layers at all. If a file has codes for one, as
bytes of two along K with e8m0 scales, they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from vllm.compressed_linear.formats.base import Format, quant_method_of, register_format
from vllm.compressed_linear.formats.entries import Components
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.modelopt_algorithms import ALGORITHMS, modelopt_scheme
from vllm.compressed_linear.formats.resolution import (
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)


@register_format("mxfp4", "gpt_oss_mxfp4")
@dataclass(frozen=True)
class Mxfp4(Format):
    """vLLM renames the method for gpt-oss, whose experts are stored in a form of their own."""

    aliases = ("mxfp4", "gpt_oss_mxfp4")
    marker_tensors = ("weight_scale", "gate_up_proj_blocks", "down_proj_blocks", "w13_weight_scale")

    ignored: Components

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        field = "modules_to_not_convert"
        # ``model.layers.*.self_attn`` is what this selects without the beginning.
        entries = {entry.rpartition("*.")[2]: entry for entry in fields.names(field)}
        return cls(config, Components(field, entries))

    def delegated(self) -> tuple[str | None, dict[str, Any]]:
        return quant_method_of(self.config), self.config

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        if (found := file.unquantized_on_disk(module)) is not None:
            return found
        if file.quantized_on_disk(module):
            return modelopt_scheme(module, file, ALGORITHMS["MXFP4"], 0)
        if ".experts." in module:
            return Delegated("experts in MXFP4")
        return Unquantized("mxfp4 is for experts")
