# SPDX-License-Identifier: Apache-2.0
"""No quantization at all: ``--quantization compressed_linear`` on a bf16 or fp16 model."""

from __future__ import annotations

from typing import Any

from vllm.compressed_linear.config import CompressedLinearConfig, register_format
from vllm.compressed_linear.resolution import LayerKind, Resolution, Unquantized


@register_format("")
class UnquantizedConfig(CompressedLinearConfig):
    """Every layer is unquantized."""

    aliases = ()
    vllm_name = None

    @classmethod
    def parse(cls, config: dict[str, Any]) -> UnquantizedConfig:
        return cls(config)

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        return Unquantized("the model is not quantized")
