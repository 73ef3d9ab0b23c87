# SPDX-License-Identifier: Apache-2.0
"""Turns the GGUF file into a bf16 checkpoint as transformers writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaTokenizer

from tokenizer import write_tokenizer

#: Where a tensor of GGUF's `blk.{i}` goes in `model.layers.{i}`.
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PROMPT = "The capital of France is"
#: How the bf16 model goes on after the prompt when it always takes the likeliest token.
CONTINUATION = " the capital of the country of France"


def convert(gguf: Path, directory: Path) -> None:
    """Writes configuration, weights and tokenizer of the model in `gguf` into `directory`."""
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config(fields).save_pretrained(directory)
    save_file(weights(reader), directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(
        directory,
        fields["tokenizer.ggml.tokens"],
        fields["tokenizer.ggml.scores"],
        fields["tokenizer.ggml.token_type"],
    )


def config(fields: dict[str, Any]) -> Gemma3TextConfig:
    """The model's configuration from GGUF's metadata.

    What GGUF does not say is the same in all text models of the family: every sixth layer sees
    everything, the others slide with a rope base of 10000, queries are scaled by 256^-1/2.
    """
    prefix = "gemma3."
    layers = fields[prefix + "block_count"]
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields[prefix + "embedding_length"],
        intermediate_size=fields[prefix + "feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=fields[prefix + "attention.head_count"],
        num_key_value_heads=fields[prefix + "attention.head_count_kv"],
        head_dim=fields[prefix + "attention.key_length"],
        max_position_embeddings=fields[prefix + "context_length"],
        rms_norm_eps=round(fields[prefix + "attention.layer_norm_rms_epsilon"], 9),  # was fp32
        sliding_window=fields[prefix + "attention.sliding_window"],
        layer_types=[
            "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention"
            for layer in range(layers)
        ],
        rope_parameters={
            "full_attention": {
                "rope_type": "default",
                "rope_theta": fields[prefix + "rope.freq_base"],
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        query_pre_attn_scalar=256,
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def weights(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """The model's weights by transformers' names, bf16.

    GGUF stores the factor of a norm; Gemma's checkpoints store what it exceeds one by.
    """
    found = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith("norm.weight"):
            value -= 1
        found[_name(tensor.name)] = value.to(torch.bfloat16)
    return found


def _name(name: str) -> str:
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in outside:
        return outside[name]
    _, layer, what, end = name.split(".")
    return f"model.layers.{layer}.{BLOCK[what]}.{end}"


def verify(directory: Path) -> None:
    """Lets transformers continue the prompt with the bf16 model; ValueError if it goes wrong."""
    tokenizer = GemmaTokenizer.from_pretrained(directory)
    model = Gemma3ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    if not text.startswith(CONTINUATION):
        raise ValueError(f"bf16 model goes on with {text!r}, expected {CONTINUATION!r}")
