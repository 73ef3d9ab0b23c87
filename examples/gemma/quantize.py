# SPDX-License-Identifier: Apache-2.0
"""Quantizes a bf16 checkpoint to 4-bit weights with the compressed-tensors library.

Round to nearest, symmetric, groups of 128 input channels; the embedding and the head that is tied
to it stay bf16.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM

GROUP = 128
SCHEME = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=True),
)


def quantize(source: Path, target: Path) -> None:
    """Reads the checkpoint in `source` and writes the quantized one into `target`."""
    model = Gemma3ForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = QuantizationConfig(
        config_groups={"group_0": SCHEME}, ignore=["lm_head"], format="pack-quantized"
    )
    apply_quantization_config(model, config)
    for module in filter(is_module_quantized, model.modules()):
        groups = module.weight.detach().unflatten(-1, (-1, GROUP))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), SCHEME.weights)
        module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor(config)
    compressor.compress_model(model)

    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("*.json"):
        shutil.copy(path, target)
    compressor.update_config(str(target))
