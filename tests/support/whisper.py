# SPDX-License-Identifier: Apache-2.0
"""A tiny random Whisper: quantized or not, with the fp32 logits of the transformers library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.model_loading import LoadedModel
from tests.support.synthetic import Model, Quant, random_weight

HIDDEN, HEADS, VOCABULARY, MELS, FRAMES = 64, 4, 128, 8, 16


@dataclass(frozen=True)
class WhisperCase:
    """``quant``: of all linear layers; None for an unquantized checkpoint."""

    quant: Quant | None
    unquantized: tuple[str, ...] = ()
    seed: int = 0


def hf_config() -> dict[str, Any]:
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": VOCABULARY,
        "num_mel_bins": MELS,
        "d_model": HIDDEN,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 2 * HIDDEN,
        "decoder_ffn_dim": 2 * HIDDEN,
        "max_source_positions": FRAMES,
        "max_target_positions": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        "torch_dtype": "float32",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }


def write(case: WhisperCase, path: Path) -> dict[str, torch.Tensor]:
    """Write the checkpoint; returns ``features`` [mels, 2 · frames], ``input_ids`` [12] and fp32
    ``logits`` [12, vocabulary]."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    ideal = WhisperForConditionalGeneration(WhisperConfig(**hf_config())).float().eval()
    tensors: dict[str, torch.Tensor] = {}
    linears = {n for n, m in ideal.named_modules() if isinstance(m, torch.nn.Linear)}
    with torch.no_grad():
        for name, parameter in ideal.named_parameters():
            module, _, kind = name.rpartition(".")
            quant = None if module.endswith(case.unquantized) else case.quant
            if module in linears and module != "proj_out" and kind == "weight" and quant:
                stored, meaning = random_weight(quant, *parameter.shape, generator, None)
                tensors |= {f"{module}.{key}": value for key, value in stored.items()}
                parameter.copy_(meaning)
                continue
            if "embed_positions" not in name and "norm" not in name:
                scale = 0.3 if kind == "bias" else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            tensors[name] = parameter.detach().clone()
        features = torch.randn(MELS, 2 * FRAMES, generator=generator)
        input_ids = torch.randint(3, VOCABULARY, (12,), generator=generator)
        logits = ideal(input_features=features[None], decoder_input_ids=input_ids[None]).logits[0]
    path.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    config = hf_config()
    if case.quant is not None:
        described = Model(case.quant, overrides=dict.fromkeys(case.unquantized))
        config["quantization_config"] = described.quantization_config()
        if "ignore" in config["quantization_config"]:
            config["quantization_config"]["ignore"].append("proj_out")
    (path / "config.json").write_text(json.dumps(config))
    return {"features": features, "input_ids": input_ids, "logits": logits}


@torch.inference_mode()
def logits(loaded: LoadedModel, reference: dict[str, torch.Tensor]) -> torch.Tensor:
    """fp32 [tokens, vocabulary] by vLLM's model, attention computed plainly."""
    from vllm.forward_context import set_forward_context

    model = loaded.model
    ids = reference["input_ids"]
    with set_forward_context(None, loaded.config), _plain_attention(model):
        states = model.model.get_encoder_outputs([reference["features"]])[0]
        hidden = model(ids, torch.arange(len(ids)), encoder_outputs=[states])
        return model.compute_logits(hidden).float()


@contextmanager
def _plain_attention(model: torch.nn.Module) -> Iterator[None]:
    patched = []
    for module in model.modules():
        attention, owner = getattr(module, "attn", None), type(module).__name__
        if owner in ("WhisperAttention", "WhisperCrossAttention"):
            causal = attention.__class__.__name__ == "Attention"
            attention.forward = _forward(attention, causal)
            patched.append(attention)
    try:
        yield
    finally:
        for attention in patched:
            del attention.forward


def _forward(layer: Any, causal: bool) -> Any:
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = [t.unflatten(-1, (HEADS, -1)).transpose(-2, -3).float() for t in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal)
        return out.transpose(-2, -3).flatten(-2).to(q.dtype)

    return forward
