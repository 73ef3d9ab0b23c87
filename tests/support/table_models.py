# SPDX-License-Identifier: Apache-2.0
"""Small random models whose embedding table and head are quantized, or not, and tied, or not,
written by the compressed-tensors library; the reference is transformers on the weights that the
library's own decompression gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from tests.support.architectures import FAMILIES, WITHOUT_LOGITS, Family


@dataclass(frozen=True)
class Bits:
    """Integer weights; ``group`` −1 is a scale for each row."""

    bits: int
    group: int = -1
    symmetric: bool = True

    def scheme(self, target: str) -> QuantizationScheme:
        grouped = {} if self.group == -1 else {"group_size": self.group}
        return QuantizationScheme(
            targets=[target],
            weights=QuantizationArgs(
                num_bits=self.bits,
                strategy="group" if grouped else "channel",
                symmetric=self.symmetric,
                **grouped,
            ),
            # The library finds out by itself for linear layers only.
            format="pack-quantized",
        )


@dataclass(frozen=True)
class TableModel:
    """``table``, ``head``: None leaves them as they are; a tied model has no head of its own."""

    family: str = "gemma3"
    tied: bool = True
    table: Bits | None = Bits(8)
    head: Bits | None = None
    linear: Bits | None = Bits(4, 32)
    vocabulary: int = 512
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def hf_config(self) -> Any:
        known = FAMILIES | WITHOUT_LOGITS
        base = known.get(self.family, Family("llama", "LlamaForCausalLM"))
        changes = {"tie_word_embeddings": self.tied, "vocab_size": self.vocabulary}
        config = Family(base.model_type, base.architecture, base.config | changes).hf_config()
        config.dtype = self.dtype
        return config


def shake(network: torch.nn.Module) -> None:
    """Add noise, so that no tensor is what it would be if it were never loaded."""
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.05)


def write(
    model: TableModel, path: Path, set_weights: Callable[[Any], None] = shake
) -> dict[str, torch.Tensor]:
    """Write the checkpoint; returns ``input_ids`` [2, 12], fp32 ``logits``, and what ``table``
    and ``head`` mean in the model's dtype. ``set_weights`` changes the weights of transformers'
    model before they are quantized."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(model.seed)
    config = model.hf_config()
    network = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    with torch.no_grad():
        set_weights(network)
    groups = {}
    if model.linear is not None:
        groups["group_0"] = model.linear.scheme("Linear")
    if model.table is not None:
        groups["group_1"] = model.table.scheme("Embedding")
    if model.head is not None:
        groups["group_2"] = model.head.scheme("re:.*lm_head")
    quantization = QuantizationConfig(
        config_groups=groups,
        ignore=[] if model.head is not None else ["lm_head"],
        format="pack-quantized",
    )
    compressor = compress(network, quantization)
    tensors = {
        name: tensor.detach().contiguous().clone()
        for name, tensor in network.state_dict().items()
        if not (model.tied and name.startswith("lm_head."))
        # Gemma's factor, which no checkpoint has; the library makes it a tensor to be saved.
        and not name.endswith(".embed_scale")
    }
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    network.config.save_pretrained(path)
    compressor.update_config(str(path))

    compressor.decompress_model(network)
    table = network.get_input_embeddings().weight.detach()
    ideal = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {
        name: tensor.float()
        for name, tensor in network.state_dict().items()
        if name in dict(ideal.named_parameters(remove_duplicate=False))
    }
    if model.tied:
        weights["lm_head.weight"] = table.float()
    ideal.load_state_dict(weights, strict=False)
    ideal.tie_weights()
    generator = torch.Generator().manual_seed(model.seed)
    input_ids = torch.randint(3, model.vocabulary, (2, 12), generator=generator)
    with torch.no_grad():
        logits = ideal(input_ids).logits
    head = network.get_output_embeddings().weight.detach().clone()
    reference = {"input_ids": input_ids, "logits": logits, "table": table, "head": head}
    (path / "reference").mkdir()
    save_file(reference, path / "reference" / "reference.safetensors")
    return reference


def compress(network: torch.nn.Module, quantization: QuantizationConfig) -> ModelCompressor:
    """Quantize the weights of ``network`` in place, as they are stored on disk."""
    apply_quantization_config(network, quantization)
    for module in filter(is_module_quantized, network.modules()):
        _calibrate(module)
    compressor = ModelCompressor(quantization)
    compressor.compress_model(network)
    return compressor


def _calibrate(module: torch.nn.Module) -> None:
    """Round to nearest between the least and the largest weight of each group."""
    arguments = module.quantization_scheme.weights
    size = arguments.group_size or module.weight.shape[1]
    groups = module.weight.detach().unflatten(-1, (-1, size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    module.weight_scale.data.copy_(scale)
    module.weight_zero_point.data.copy_(zero)
