# SPDX-License-Identifier: Apache-2.0
"""``--quantization compressed_linear`` on a model whose config.json has no quantization.

Either a bf16 or fp16 model, or one of early AutoGPTQ or AutoAWQ, which wrote a separate file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vllm.compressed_linear.checkpoint.bounded_read import read_json_file
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.base import Format, quant_method_of, register_format
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    LayerKind,
    Resolution,
    Unquantized,
)

CONFIG_FILES = ("quantize_config.json", "quant_config.json")
"""Names of the files of AutoGPTQ and AutoAWQ, in the order in which AutoGPTQ looks for them."""


@register_format("")
@dataclass(frozen=True)
class UnquantizedModel(Format):
    """Every layer is unquantized."""

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        return cls(config)

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        if not config:
            return None
        return (
            f"quantization_config has no quant_method (keys: {', '.join(map(str, config))}), so "
            "nothing says how its tensors are stored; the tool that wrote it knows its name"
        )

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        return Unquantized("the model is not quantized")


def read_config_file(directory: str | Path) -> dict[str, Any] | None:
    """The quantization configuration of early AutoGPTQ or AutoAWQ in a local directory, with its
    ``quant_method``; None if there is none. Raises ``ConfigError`` with the name of the file."""
    for name in CONFIG_FILES:
        path = Path(directory) / name
        if not path.is_file():
            continue
        try:
            config = read_json_file(path, "the quantization configuration")
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: {type(config).__name__}, expected a map")
        if quant_method_of(config) not in ("", "mlx"):  # which has no file of its own
            return config
        awq = str(config.get("version") or "").lower().startswith("gem")
        return {**config, "quant_method": "awq" if awq else "gptq"}
    return None
