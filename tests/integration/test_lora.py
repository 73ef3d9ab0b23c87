# SPDX-License-Identifier: Apache-2.0
"""Adapters on quantized layers: what vLLM's own LoRA code makes of them, y = base + B·A·x."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.architectures import FAMILIES, VOCABULARY, Family, write
from tests.support.lora import activate, with_adapters
from tests.support.model_loading import loaded, logits
from tests.support.synthetic import Quant
from vllm.compressed_linear import settings

RANK, ALPHA = 8, 16
LLAMA = Family("llama", "LlamaForCausalLM")


def write_adapter(ideal: Path, adapter: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """Write a random adapter (PEFT's files) for every projection of the model at ``ideal``; returns
    transformers' fp32 logits with the adapter merged into the weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ideal, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    targets = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module = name.removesuffix(".weight")
            if not module.endswith("_proj"):
                continue
            n, k = parameter.shape
            a = torch.randn(RANK, k, generator=generator) * 0.1
            b = torch.randn(n, RANK, generator=generator) * 0.1
            parameter.add_(b @ a * (ALPHA / RANK))
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            targets.add(module.rpartition(".")[2])
        merged = model(input_ids).logits.float()
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": RANK,
                "lora_alpha": ALPHA,
                "target_modules": sorted(targets),
                "bias": "none",
            }
        )
    )
    return merged


def worst(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours = ours[..., :VOCABULARY]
    return float((ours.log_softmax(-1) - reference.log_softmax(-1)).abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen2-qkv-bias"])
@pytest.mark.parametrize(
    "quant",
    [Quant("gptq"), Quant("awq", symmetric=False), Quant("ct", bits=3)],
    ids=lambda quant: quant.form,
)
def test_an_adapter_adds_to_quantized_layers(family: str, quant: Quant, tmp_path: Path) -> None:
    checkpoint = write(FAMILIES.get(family, LLAMA), quant, tmp_path)
    adapter = tmp_path / "adapter"
    merged = write_adapter(checkpoint.ideal, adapter, checkpoint.input_ids)
    tokens = checkpoint.input_ids.shape[1]
    assert checkpoint.logits is not None
    assert worst(checkpoint.logits, merged) > 0.1
    with loaded(
        checkpoint.quantized, skip_tokenizer_init=True, enable_lora=True, max_lora_rank=RANK
    ) as model:
        manager = with_adapters(model)
        activate(manager, adapter, tokens)
        assert worst(logits(model, checkpoint.input_ids), merged) <= 1e-4
        activate(manager, None, tokens)
        assert worst(logits(model, checkpoint.input_ids), checkpoint.logits) <= 1e-4


def test_an_adapter_adds_to_unquantized_layers_on_our_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(settings.BACKEND, "unquantized=cpu")
    checkpoint = write(LLAMA, Quant("gptq"), tmp_path)
    adapter = tmp_path / "adapter"
    merged = write_adapter(checkpoint.ideal, adapter, checkpoint.input_ids)
    with loaded(
        checkpoint.ideal,
        skip_tokenizer_init=True,
        quantization="compressed_linear",
        enable_lora=True,
        max_lora_rank=RANK,
    ) as model:
        manager = with_adapters(model)
        activate(manager, adapter, checkpoint.input_ids.shape[1])
        assert worst(logits(model, checkpoint.input_ids), merged) <= 1e-4
