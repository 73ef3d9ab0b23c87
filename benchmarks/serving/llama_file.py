# SPDX-License-Identifier: Apache-2.0
"""A Llama of synthetic weights as a GGUF file: 4-bit linears (Q4_0), 8-bit embedding and head.

Q4_0 is what llama.cpp repacks for this kind of processor, so it is the fastest 4-bit type it has.
"""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from benchmarks.checkpoint import Shape

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BLOCK = 32


def _blocks(n: int, k: int, code_bytes: int, spread: float) -> NDArray[np.uint8]:
    """Blocks of 32 channels: an fp16 scale, then random codes; ``spread`` is that of a code."""
    draw = np.random.default_rng(n * k)
    blocks = draw.integers(0, 256, (n, k // BLOCK, 2 + code_bytes), dtype=np.uint8)
    scale = (0.5 + draw.random((n, k // BLOCK, 1))) / (spread * math.sqrt(k))
    blocks[..., :2] = scale.astype(np.float16).view(np.uint8)
    return blocks.reshape(n, -1)


def q4_0(n: int, k: int) -> NDArray[np.uint8]:
    """Random weights [n, k] of type Q4_0, as bytes [n, ·]."""
    return _blocks(n, k, BLOCK // 2, 4.6)


def q8_0(n: int, k: int) -> NDArray[np.uint8]:
    """Random weights [n, k] of type Q8_0, as bytes [n, ·]."""
    return _blocks(n, k, BLOCK, 74.0)


def write_llama(shape: Shape, file: Path) -> None:
    """Writes the whole model into ``file``; its vocabulary has ids only."""
    writer = gguf.GGUFWriter(file, "llama", use_temp_file=False)
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, data: NDArray[np.uint8], kind: gguf.GGMLQuantizationType) -> None:
        writer.add_tensor(name, data, raw_dtype=kind)

    ones = np.ones(hidden, dtype=np.float32)
    table = q8_0(shape.vocab_size, hidden)
    add("token_embd.weight", table, gguf.GGMLQuantizationType.Q8_0)
    if not shape.tie_word_embeddings:
        add("output.weight", table, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(shape.num_hidden_layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
        for name, n, k in shape.linears():
            kind = gguf.GGMLQuantizationType.Q4_0
            add(f"blk.{layer}.{NAMES[name]}.weight", q4_0(n, k), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
