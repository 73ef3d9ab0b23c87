# SPDX-License-Identifier: Apache-2.0
"""Quantizes a bf16 checkpoint to 4-bit weights with the compressed-tensors library.

Round to nearest, symmetric, groups of 128 input channels. The embedding table, which is the head as
well, stays bf16 or gets 8 bits in the same groups: it holds most of the model's weights.
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
NOT_SAVED = ("lm_head.weight", "model.embed_tokens.embed_scale")
"""The head is tied to the table; the table's factor is the model class's own."""
LINEAR = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP, symmetric=True),
    format="pack-quantized",
)
TABLE = QuantizationScheme(
    targets=["Embedding"],
    weights=QuantizationArgs(num_bits=8, strategy="group", group_size=GROUP, symmetric=True),
    format="pack-quantized",
)


def quantize(source: Path, target: Path, *, table: bool) -> None:
    """Reads the checkpoint in `source` and writes the quantized one into `target`.

    `table`: whether the embedding table is quantized, too.
    """
    model = Gemma3ForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = QuantizationConfig(
        config_groups={"group_0": LINEAR} | ({"group_1": TABLE} if table else {}),
        ignore=["lm_head"],
        format="pack-quantized",
    )
    apply_quantization_config(model, config)
    for module in filter(is_module_quantized, model.modules()):
        groups = module.weight.detach().unflatten(-1, (-1, GROUP))
        scheme = module.quantization_scheme.weights
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme)
        module.weight_scale.data.copy_(scale)
    save(model, config, source, target)


def save(model: Gemma3ForCausalLM, config: QuantizationConfig, source: Path, target: Path) -> None:
    """Writes `model`, calibrated for `config`, into `target`, with the other files of `source`."""
    compressor = ModelCompressor(config)
    compressor.compress_model(model)
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name not in NOT_SAVED
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("*.json"):
        shutil.copy(path, target)
    compressor.update_config(str(target))
