# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 in the schemes that servers use, quantized by the compressed-tensors library.

Weights are rounded to nearest. Static scales of inputs are one number, which speed does not depend
on. The embedding table, which is the head as well, stays bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationStrategy,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    is_module_quantized,
)
from transformers import Gemma3ForCausalLM

from quantize import save

SCHEMES = {
    "fp8-static": ("FP8", "float-quantized"),
    "fp8": ("FP8_DYNAMIC", "float-quantized"),
    "fp8-block": ("FP8_BLOCK", "float-quantized"),
    "w8a8": ("W8A8", "int-quantized"),
    "w8a16": ("W8A16", "pack-quantized"),
    "w4a8": ("W4A8", "pack-quantized"),
    "w4afp8": ("W4AFP8", "pack-quantized"),
    "nvfp4a16": ("NVFP4A16", "nvfp4-pack-quantized"),
    "nvfp4": ("NVFP4", "nvfp4-pack-quantized"),
    "mxfp4a16": ("MXFP4A16", "mxfp4-pack-quantized"),
    "mxfp4": ("MXFP4", "mxfp4-pack-quantized"),
    "mxfp8": ("MXFP8", "mxfp8-quantized"),
}
"""Name → the library's preset, and the format in which it stores it."""
INPUT_RANGE = 32.0
"""Largest |x| that static scales of inputs expect."""


def quantize(source: Path, target: Path, name: str) -> None:
    """Read the bf16 checkpoint in ``source`` and write it into ``target`` in one of ``SCHEMES``."""
    preset, form = SCHEMES[name]
    scheme = preset_name_to_scheme(preset, ["Linear"]).model_copy(update={"format": form})
    model = Gemma3ForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=form)
    apply_quantization_config(model, config)
    for module in filter(is_module_quantized, model.modules()):
        _calibrate(module)
    target.mkdir(parents=True, exist_ok=True)
    save(model, config, source, target)


def _calibrate(module: Any) -> None:
    weight, weights = module.weight.detach(), module.quantization_scheme.weights
    low, high = _limits(weight, weights)
    second = None
    if hasattr(module, "weight_global_scale"):
        second = generate_gparam(weight.amin(), weight.amax())
        module.weight_global_scale.data.copy_(second.reshape(module.weight_global_scale.shape))
    scale, zero = calculate_qparams(low, high, weights, global_scale=second)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.data.fill_(448 * 6 / INPUT_RANGE)
    if hasattr(module, "input_scale"):
        module.input_scale.data.fill_(INPUT_RANGE / 448)


def _limits(weight: torch.Tensor, arguments: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest weight that each scale is for."""
    strategy = arguments.strategy
    if strategy == QuantizationStrategy.TENSOR:
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if strategy == QuantizationStrategy.CHANNEL:
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == QuantizationStrategy.BLOCK:
        rows, columns = arguments.block_structure or (128, 128)
        padded = torch.nn.functional.pad(
            weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        )
        blocks = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.unflatten(-1, (-1, arguments.group_size))
    return groups.amin(-1), groups.amax(-1)
