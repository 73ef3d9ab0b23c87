# SPDX-License-Identifier: Apache-2.0
"""``--quantization compressed_linear`` on a model whose config.json says nothing of quantization.

It is a bf16 or fp16 model, or one of early AutoGPTQ or AutoAWQ, which wrote a file of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm.compressed_linear.formats.resolution import LayerKind, Resolution, Unquantized
from vllm.compressed_linear.integration.config import (
    CompressedLinearConfig,
    ConfigError,
    quant_method_of,
    register_format,
)

CONFIG_FILES = ("quantize_config.json", "quant_config.json")
"""What AutoGPTQ and AutoAWQ called their files, in the order AutoGPTQ looks for them."""


@register_format("")
class UnquantizedConfig(CompressedLinearConfig):
    """Every layer is unquantized, unless a file beside config.json tells of a format."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.described: CompressedLinearConfig | None = None

    @classmethod
    def parse(cls, config: dict[str, Any]) -> UnquantizedConfig:
        return cls(config)

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        return "a quantization_config without quant_method" if config else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the headers, and the tool's own configuration file where there is one."""
        super().maybe_update_config(model_name, hf_config, revision)
        config = read_config_file(model_name)
        if config is None:
            return
        self.described = CompressedLinearConfig.from_config(config)
        self.described.headers, self.described.disk_names = self.headers, self.disk_names
        # Delegation and the check against the file ask these.
        self.config = self.described.config
        self.vllm_name = self.described.vllm_name
        self.codes_tensors = self.described.codes_tensors

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        if self.described is not None:
            self.described.headers = self.headers

    def map_names(self, rename: Any) -> None:
        if self.described is not None:
            self.described.map_names(rename)

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        if self.described is not None:
            return self.described.resolve(module, kind)
        return Unquantized("the model is not quantized")


def read_config_file(directory: str) -> dict[str, Any] | None:
    """The quantization configuration of early AutoGPTQ or AutoAWQ in a local directory, with its
    ``quant_method``; None where there is none. Raises ``ConfigError`` naming the file."""
    for name in CONFIG_FILES:
        path = Path(directory) / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path}: no JSON: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: {type(config).__name__}, expected a map")
        if quant_method_of(config):
            return config
        awq = str(config.get("version") or "").lower().startswith("gem")
        return {**config, "quant_method": "awq" if awq else "gptq"}
    return None
