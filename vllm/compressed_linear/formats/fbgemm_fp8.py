# SPDX-License-Identifier: Apache-2.0
"""``quant_method: fbgemm_fp8`` (Llama 3.1 405B): e4m3 with a scale for each output channel, x in
e4m3 per token, after |x| was bounded by ``activation_scale_ub``.

transformers takes the bound from the configuration, never from a tensor, and 1200 if it is not
there. Source: vLLM ``layers/quantization/fbgemm_fp8.py``, transformers
``integrations/fbgemm_fp8.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from vllm.compressed_linear.formats.base import Format, register_format
from vllm.compressed_linear.formats.entries import Components
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.float8 import PER_TOKEN, Names, float8_scheme
from vllm.compressed_linear.formats.fp8 import left_out
from vllm.compressed_linear.formats.resolution import LayerKind, Resolution
from vllm.compressed_linear.spec.scheme import Role, StoredTensor

BOUND = StoredTensor("input_scale_ub", Role.IGNORED, "float32", (1,), optional=True)


@register_format("fbgemm_fp8")
@dataclass(frozen=True)
class FbgemmFp8(Format):
    aliases = ("fbgemm_fp8",)
    vllm_name = "fbgemm_fp8"
    marker_tensors = ("weight_scale",)

    ignored: Components
    limit: float
    """Of |x|."""

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        field = "modules_to_not_convert"
        limit = fields.positive("activation_scale_ub", default=1200.0)
        return cls(config, Components.of(field, fields.names(field)), limit)

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        if (plain := left_out("fbgemm_fp8", self.ignored, module, kind, file)) is not None:
            return plain
        activation = replace(PER_TOKEN, limit=self.limit)
        scheme = float8_scheme(module, file, Names(), activation, by_channel=True)
        if file.header(module, BOUND.name) is None:
            return scheme
        return replace(scheme, tensors=(*scheme.tensors, BOUND))
