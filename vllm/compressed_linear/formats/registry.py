# SPDX-License-Identifier: Apache-2.0
"""Choice of the format for a checkpoint. Importing this registers the formats of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.compressed_linear.formats import (  # noqa: F401
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    fbgemm_fp8,
    fp8,
    gptq,
    mlx,
    modelopt,
    mxfp4,
    quark,
)
from vllm.compressed_linear.formats.base import _FORMATS, Format, quant_method_of
from vllm.compressed_linear.formats.elsewhere import what_runs
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.formats.unquantized import read_config_file


def formats() -> dict[str, type[Format]]:
    """quant_method → class of every format."""
    return dict(_FORMATS)


def format_of(config: dict[str, Any]) -> type[Format] | None:
    """The format that reads ``config`` and supports at least a part of it, or None."""
    found = _FORMATS.get(quant_method_of(config))
    return found if found is not None and found.unsupported(config) is None else None


def why_not_read(config: dict[str, Any]) -> str:
    """Why ``format_of`` has no format for ``config``, and who may run the checkpoint."""
    if elsewhere := what_runs(config):
        return elsewhere
    found = _FORMATS.get(quant_method_of(config))
    if found is not None and (why := found.unsupported(config)) is not None:
        return why
    known = ", ".join(sorted(name for name in _FORMATS if name))
    return f"quant_method {quant_method_of(config)!r} is not known (read here: {known})"


def parse(config: dict[str, Any]) -> Format:
    """The format of a ``quantization_config``. Raises ``ConfigError``."""
    found = _FORMATS.get(quant_method_of(config))
    if found is None:
        raise ConfigError(why_not_read(config))
    return found.parse(config)


def parse_in(directory: str | Path, config: dict[str, Any]) -> Format:
    """The format of the checkpoint in ``directory`` with the quantization ``config`` of its
    config.json; without a ``quant_method``, by the configuration file of early AutoGPTQ or
    AutoAWQ."""
    own = None if quant_method_of(config) else read_config_file(directory)
    config = config if own is None else own
    if _FORMATS.get(quant_method_of(config)) is modelopt.ModelOpt:
        config = modelopt.with_separate(directory, config)
    return parse(config)
