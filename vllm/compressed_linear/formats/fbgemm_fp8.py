# SPDX-License-Identifier: Apache-2.0
"""``quant_method: fbgemm_fp8`` (Llama 3.1 405B): e4m3 with a scale for each output channel, x in
e4m3 per token.

Source: vLLM ``layers/quantization/fbgemm_fp8.py``, transformers ``integrations/fbgemm_fp8.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from vllm.compressed_linear.formats.base import Format, register_format
from vllm.compressed_linear.formats.entries import Components
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.float8 import PER_TOKEN, Names, float8_scheme
from vllm.compressed_linear.formats.fp8 import left_out
from vllm.compressed_linear.formats.resolution import LayerKind, Resolution


@register_format("fbgemm_fp8")
@dataclass(frozen=True)
class FbgemmFp8(Format):
    """``activation_scale_ub`` bounds |x| before it is quantized (1200); it is not applied."""

    aliases = ("fbgemm_fp8",)
    vllm_name = "fbgemm_fp8"
    marker_tensors = ("weight_scale",)

    ignored: Components

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        field = "modules_to_not_convert"
        return cls(config, Components.of(field, fields.names(field)))

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        if (plain := left_out("fbgemm_fp8", self.ignored, module, kind, file)) is not None:
            return plain
        return float8_scheme(module, file, Names(), PER_TOKEN, by_channel=True)
