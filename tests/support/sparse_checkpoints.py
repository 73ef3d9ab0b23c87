# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of real sizes for tests: headers are written, data is a hole in the file."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

_BYTES = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1}


def write_sparse(path: Path, config: dict[str, Any], tensors: dict[str, Any], files: int) -> None:
    """A checkpoint of the right sizes that takes no room on disk."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    step = -(-len(names) // files)
    for index in range(files):
        header, end = {}, 0
        for name in names[index * step : (index + 1) * step]:
            dtype, shape = tensors[name]
            size = prod(shape) * _BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        file = path / f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)


def gptq(name: str, n: int, k: int, group: int = 128) -> dict[str, Any]:
    return {
        f"{name}.qweight": ("I32", [k // 8, n]),
        f"{name}.qzeros": ("I32", [k // group, n // 8]),
        f"{name}.scales": ("F16", [k // group, n]),
        f"{name}.g_idx": ("I32", [k]),
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}


def llama_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "quantization_config": GPTQ,
        **changes,
    }


def llama_tensors(hidden: int, inner: int, kv: int, layers: int, vocab: int) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        for name, n in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            tensors |= gptq(f"{prefix}self_attn.{name}_proj", n, hidden)
        tensors |= gptq(f"{prefix}mlp.gate_proj", inner, hidden)
        tensors |= gptq(f"{prefix}mlp.up_proj", inner, hidden)
        tensors |= gptq(f"{prefix}mlp.down_proj", hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = ("F16", [hidden])
    tensors["model.norm.weight"] = ("F16", [hidden])
    tensors["model.embed_tokens.weight"] = ("F16", [vocab, hidden])
    tensors["lm_head.weight"] = ("F16", [vocab, hidden])
    return tensors


def packed(name: str, n: int, k: int, group: int = 32) -> dict[str, Any]:
    """The tensors of a symmetric 4-bit linear as compressed-tensors packs it."""
    return {
        f"{name}.weight_packed": ("I32", [n, k // 8]),
        f"{name}.weight_scale": ("BF16", [n, k // group]),
        f"{name}.weight_shape": ("I64", [2]),
    }


def plain(name: str, n: int, k: int) -> dict[str, Any]:
    """The tensor of an unquantized linear."""
    return {f"{name}.weight": ("BF16", [n, k])}


EXPERTS_PACKED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
            },
        }
    },
}
"""As of the large mixtures of which only the routed experts are quantized."""


def deepseek_config(layers: int = 61, experts: int = 384, **changes: Any) -> dict[str, Any]:
    """The sizes of Kimi K2: 61 layers, the first of which is dense, of 384 experts."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 163840,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
        "quantization_config": EXPERTS_PACKED,
        **changes,
    }


def deepseek_tensors(config: dict[str, Any], quantized: Any = packed) -> dict[str, Any]:
    """The tensors of ``deepseek_config``; ``quantized``: those of one projection of an expert."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    q_rank, kv_rank, value = config["q_lora_rank"], config["kv_lora_rank"], config["v_head_dim"]
    tensors: dict[str, Any] = {}

    def mlp(name: str, inner: int, linear: Any) -> None:
        nonlocal tensors
        for part, n, k in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            tensors |= linear(f"{name}.{part}_proj", n, k)

    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, n, k in (
            ("q_a_proj", q_rank, hidden),
            ("q_b_proj", heads * (nope + rope), q_rank),
            ("kv_a_proj_with_mqa", kv_rank + rope, hidden),
            ("kv_b_proj", heads * (nope + value), kv_rank),
            ("o_proj", hidden, heads * value),
        ):
            tensors |= plain(f"{layer}.self_attn.{name}", n, k)
        for norm, length in (
            ("self_attn.q_a_layernorm", q_rank),
            ("self_attn.kv_a_layernorm", kv_rank),
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
        ):
            tensors[f"{layer}.{norm}.weight"] = ("BF16", [length])
        if index < config["first_k_dense_replace"]:
            mlp(f"{layer}.mlp", config["intermediate_size"], plain)
            continue
        experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
        tensors |= plain(f"{layer}.mlp.gate", experts, hidden)
        tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = ("F32", [experts])
        mlp(f"{layer}.mlp.shared_experts", inner * config["n_shared_experts"], plain)
        for expert in range(experts):
            for part, n, k in (
                ("gate", inner, hidden),
                ("up", inner, hidden),
                ("down", hidden, inner),
            ):
                tensors.update(quantized(f"{layer}.mlp.experts.{expert}.{part}_proj", n, k))
    tensors["model.norm.weight"] = ("BF16", [hidden])
    for name in ("model.embed_tokens", "lm_head"):
        tensors |= plain(name, config["vocab_size"], hidden)
    return tensors
