# SPDX-License-Identifier: Apache-2.0
"""Small random quantized models of many families, as their makers' tools would write them.

Each checkpoint has a twin of the same, dequantized weights. What the twin computes in the
transformers library, or in vLLM as it is, the quantized one has to compute too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.model_loading import loaded
from tests.support.synthetic import Model, Quant, random_weight

VOCABULARY = 512
LAYER_WEIGHTS = (
    r"(layers?|h|blocks)\.\d+\.(?!.*(norm|ln_|conv1d|dt_proj|router|experts\.|shared_expert_gate))"
    r"(?!.*\.gate\.weight$).*\.weight$"
)
"""Weights a quantizer takes: linears of the decoder's layers, neither routers nor experts."""
TEXT_WEIGHTS = r"(?<!visual\.)(?<!encoder\.)layers\.\d+\.\w+\.\w+_proj\.weight$"
"""The same of a model that also sees."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Configuration entries that most families share."""

GPT = {"n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 128, "n_inner": 256}
GPT |= {"num_key_value_heads": 4, "tie_word_embeddings": True}
MIXTURE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
SHARED = {"shared_expert_intermediate_size": 64}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
STATE_SPACE = {"mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 1, "ssm_state_size": 16}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
MATRIX = torch.empty(0, 0)


@dataclass(frozen=True)
class Family:
    """A model family: ``model_type`` and what its configuration says beside ``SIZES``.

    ``quantized``: regex over names of tensors on disk. ``input_major``: weights are [K, N] on
    disk (GPT-2). ``auto``: which of transformers' automatic classes builds it. ``ignore``: entries
    of a compressed-tensors ignore list. ``renames``: (regex, replacement) from the names that
    transformers saves to those that published checkpoints have.
    """

    model_type: str
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    quantized: str = LAYER_WEIGHTS
    input_major: bool = False
    auto: str = "AutoModelForCausalLM"
    ignore: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()

    def hf_config(self) -> Any:
        from transformers import AutoConfig

        config = AutoConfig.for_model(self.model_type, **(SIZES | self.config))
        config.architectures = [self.architecture]
        return config


@dataclass(frozen=True)
class Checkpoint:
    """Directories of a quantized checkpoint and of its dequantized twin, and what was quantized."""

    quantized: Path
    ideal: Path
    modules: frozenset[str]
    input_ids: torch.Tensor
    logits: torch.Tensor | None


@contextmanager
def wrapped_classes_uncompiled(hf_config: Any) -> Iterator[None]:
    """Where vLLM has no model of its own it wraps the library's classes, for good, in ones that ask
    for vLLM's configuration and compile themselves; with this one they do as the library does."""
    from vllm.config import (
        CompilationConfig,
        CompilationMode,
        VllmConfig,
        set_current_vllm_config,
    )

    config = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    object.__setattr__(config, "model_config", SimpleNamespace(hf_config=hf_config))
    with set_current_vllm_config(config):
        yield


def write(family: Family, quant: Quant, path: Path, *, reference: bool = True) -> Checkpoint:
    """Write both checkpoints below ``path``. ``reference``: compute transformers' fp32 logits of
    ``input_ids`` [2, 12]."""
    import transformers

    generator = torch.Generator().manual_seed(len(family.model_type))
    auto = getattr(transformers, family.auto)
    torch.manual_seed(0)
    with wrapped_classes_uncompiled(family.hf_config()):
        model = auto.from_config(family.hf_config(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # No tensor may be what it would be if it were never loaded.
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    ideal, quantized = path / "ideal", path / "quantized"
    model.save_pretrained(ideal)
    weights = load_file(ideal / "model.safetensors")
    for pattern, name in family.renames:
        weights = {re.sub(pattern, name, old): weight for old, weight in weights.items()}
    stored: dict[str, torch.Tensor] = {}
    modules = set()
    for name, weight in sorted(weights.items()):
        if weight.ndim != 2 or not re.search(family.quantized, name):
            stored[name] = weight
            continue
        module = name.removesuffix(".weight")
        modules.add(module)
        n, k = reversed(weight.shape) if family.input_major else weight.shape
        tensors, meaning = random_weight(quant, n, k, generator, None)
        stored |= {f"{module}.{key}": value for key, value in tensors.items()}
        weights[name] = meaning.t().contiguous() if family.input_major else meaning
    assert modules, f"{family.model_type}: nothing matches {family.quantized} of {sorted(weights)}"
    save_file(weights, ideal / "model.safetensors", {"format": "pt"})
    quantized.mkdir()
    save_file({k: v.contiguous() for k, v in stored.items()}, quantized / "model.safetensors")
    config = json.loads((ideal / "config.json").read_text())
    config["quantization_config"] = quantization_config(family, quant)
    (quantized / "config.json").write_text(json.dumps(config))
    input_ids = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
    logits = None
    if reference:
        with torch.no_grad(), wrapped_classes_uncompiled(family.hf_config()):
            twin = auto.from_pretrained(ideal, dtype=torch.float32).eval()
            logits = twin(input_ids).logits.float()
    return Checkpoint(quantized, ideal, frozenset(modules), input_ids, logits)


def quantization_config(family: Family, quant: Quant) -> dict[str, Any]:
    """As the tools write it: GPTQ and AWQ say nothing of routers and heads, compressed-tensors
    lists what it ignores."""
    config = Model(quant).quantization_config()
    if quant.form == "ct":
        config["ignore"] = ["lm_head", *family.ignore]
    return config


@torch.inference_mode()
def layer_outputs(
    path: Path, x_of: Callable[[torch.Tensor], torch.Tensor] | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    """What each linear layer and head of the model at ``path`` gives for a fixed random input, and
    what the attention layers made of their weights, as vLLM loads it: name → fp32. ``x_of``: what
    the layers are given in the place of that input.

    Needs no forward pass, so it works for layers of which the CPU has no kernel or which need a
    cache (state-space models, latent attention).
    """
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    out = {}
    with loaded(path, skip_tokenizer_init=True, **options) as model:
        for name, layer in model.model.named_modules():
            for derived in ("W_UV", "W_UK_T"):
                if isinstance(found := getattr(layer, derived, None), torch.Tensor):
                    out[f"{name}.{derived}"] = found.float()
            if isinstance(layer, ParallelLMHead):
                k = layer.embedding_dim
            elif isinstance(layer, LinearBase) and getattr(layer, "weight", MATRIX).ndim < 3:
                k = getattr(layer, "input_size_per_partition", layer.input_size)
            else:
                continue
            x = torch.randn(3, k, generator=torch.Generator().manual_seed(k))
            x = x if x_of is None else x_of(x)
            y = layer.quant_method.apply(layer, x, getattr(layer, "bias", None))
            out[name] = y.float()
    return out


FAMILIES = {
    "qwen2-qkv-bias": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3-qk-norm": Family("qwen3", "Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma-tied": Family("gemma", "GemmaForCausalLM", {"head_dim": 32} | TIED),
    "gemma2": Family(
        "gemma2", "Gemma2ForCausalLM", GEMMA | TIED | {"attn_logit_softcapping": None}
    ),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", GEMMA | TIED),
    "phi": Family("phi", "PhiForCausalLM"),
    "phi3-fused-on-disk": Family(
        "phi3", "Phi3ForCausalLM", {"original_max_position_embeddings": 128}
    ),
    "mistral": Family("mistral", "MistralForCausalLM"),
    "opt": Family("opt", "OPTForCausalLM", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "gpt2-input-major": Family("gpt2", "GPT2LMHeadModel", GPT, input_major=True),
    "gptj": Family("gptj", "GPTJForCausalLM", GPT | {"rotary_dim": 16, **UNTIED}),
    "gpt-neox-fused-by-heads": Family("gpt_neox", "GPTNeoXForCausalLM", {"num_key_value_heads": 4}),
    "falcon-one-kv-head": Family(
        "falcon", "FalconForCausalLM", TIED | {"multi_query": True, "alibi": False}
    ),
    "falcon-kv-groups": Family(
        "falcon",
        "FalconForCausalLM",
        TIED | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    "falcon-fused-by-heads": Family(
        "falcon",
        "FalconForCausalLM",
        TIED | {"multi_query": False, "bias": True, "alibi": False, "parallel_attn": False},
    ),
    "starcoder2": Family("starcoder2", "Starcoder2ForCausalLM"),
    "stablelm": Family("stablelm", "StableLmForCausalLM"),
    "cohere-logit-scale": Family("cohere", "CohereForCausalLM", TIED),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM"),
    "glm-gate-up-on-disk": Family("glm", "GlmForCausalLM", {"head_dim": 32}),
    "glm4": Family("glm4", "Glm4ForCausalLM", {"head_dim": 32}),
    "granite": Family("granite", "GraniteForCausalLM"),
    "nemotron": Family("nemotron", "NemotronForCausalLM", {"head_dim": 32}),
    "persimmon": Family("persimmon", "PersimmonForCausalLM", {"num_key_value_heads": 4}),
    "minicpm3": Family("minicpm3", "MiniCPM3ForCausalLM", LATENT_ATTENTION | {"q_lora_rank": 64}),
    "gemma4": Family(
        "gemma4_text",
        "Gemma4ForCausalLM",
        TIED
        | {
            "head_dim": 32,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
            "sliding_window": 64,
            "num_kv_shared_layers": 0,
        },
    ),
    "glm4-moe": Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        MIXTURE
        | {
            "head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "mixtral": Family("mixtral", "MixtralForCausalLM", MIXTURE),
    "qwen2-moe-shared-expert": Family("qwen2_moe", "Qwen2MoeForCausalLM", MIXTURE | SHARED),
    "qwen3-moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", MIXTURE | {"head_dim": 32}),
    "granite-moe-experts-fused": Family("granitemoe", "GraniteMoeForCausalLM", MIXTURE),
}
"""Families whose logits vLLM computes on a CPU, with transformers as the reference."""

WITHOUT_LOGITS = {
    "deepseek2-latent-attention": Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        LATENT_ATTENTION | {"q_lora_rank": None, "topk_method": "greedy"},
    ),
    "deepseek3-latent-attention": Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        LATENT_ATTENTION | {"q_lora_rank": 64, "topk_method": "noaux_tc"},
    ),
    "qwen3-next-tuple-shards": Family(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        MIXTURE
        | SHARED
        | {
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "qwen3.5-hybrid": Family(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        {
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "falcon-h1-hybrid": Family(
        "falcon_h1",
        "FalconH1ForCausalLM",
        {
            "head_dim": 32,
            "mamba_d_ssm": 256,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
        },
    ),
    "gemma3n-renamed-modules": Family(
        "gemma3n_text",
        "Gemma3nForCausalLM",
        TIED
        | {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 16,
            "altup_num_inputs": 2,
            "sliding_window": 64,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gpt-oss-sinks": Family(
        "gpt_oss", "GptOssForCausalLM", MIXTURE | {"head_dim": 32, "sliding_window": 64}
    ),
    "mamba2": Family(
        "mamba2",
        "Mamba2ForCausalLM",
        {"num_heads": 8, "head_dim": 32, "expand": 2, "n_groups": 1, "state_size": 16},
    ),
    "nemotron-h-hybrid": Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        STATE_SPACE | {"hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "head_dim": 32},
    ),
    "jamba-hybrid": Family(
        "jamba",
        "JambaForCausalLM",
        {
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 4,
            "expert_layer_offset": 3,
            "use_mamba_kernels": False,
            "mamba_dt_rank": 32,
            "mamba_d_state": 16,
        },
        # vLLM builds the projections of the first kind of Mamba mixer without quantization.
        quantized=r"(self_attn|feed_forward).*_proj\.weight$",
    ),
    "gpt-bigcode-one-kv-head": Family("gpt_bigcode", "GPTBigCodeForCausalLM", GPT),
}
"""Families that a CPU, or attention without a cache, cannot run: compared layer by layer."""

LLAMA4 = Family(
    "llama4_text",
    "Llama4ForCausalLM",
    {
        "head_dim": 32,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 3,
        "intermediate_size_mlp": 256,
        "num_experts_per_tok": 1,
        "attn_temperature_tuning": False,
        "attention_chunk_size": 64,
    },
)
"""vLLM reorders its q and k, but only tensors of some names."""

BLOOM = Family("bloom", "BloomForCausalLM", TIED | {"n_head": 4, "n_layer": 2, "hidden_size": 384})
"""vLLM reorders the first axis of its fused q, k and v, whatever that is."""

POOLING = {
    "qwen3": FAMILIES["qwen3-qk-norm"],
    "bert": Family(
        "bert",
        "BertModel",
        auto="AutoModel",
        quantized=r"encoder\.layer\.\d+\..*(query|key|value|dense)\.weight$",
    ),
    "modernbert": Family(
        "modernbert",
        "ModernBertModel",
        {"layer_types": ["sliding_attention", "full_attention"]},
        auto="AutoModel",
        quantized=r"layers\.\d+\..*(Wqkv|Wo|Wi)\.weight$",
    ),
}
"""Models that embed text, without a head."""

SEEING = {
    "llava": Family(
        "llava",
        "LlavaForConditionalGeneration",
        {
            "text_config": SIZES | {"model_type": "llama"},
            "vision_config": VISION,
            "image_token_index": 500,
        },
        quantized=TEXT_WEIGHTS,
        auto="AutoModelForImageTextToText",
        ignore=("re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
        renames=((r"vision_tower\.(?!vision_model)", "vision_tower.vision_model."),),
    ),
    "gemma3-seeing": Family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        TIED
        | {
            "text_config": SIZES | GEMMA | {"model_type": "gemma3_text"},
            "vision_config": VISION,
            "image_token_index": 500,
            "mm_tokens_per_image": 4,
        },
        quantized=TEXT_WEIGHTS,
        auto="AutoModelForImageTextToText",
        ignore=("re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
        renames=((r"vision_tower\.(?!vision_model)", "vision_tower.vision_model."),),
    ),
    "qwen2-vl": Family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": SIZES
            | {
                "model_type": "qwen2_vl_text",
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [4, 6, 6],
                },
            },
            "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2},
        },
        quantized=TEXT_WEIGHTS,
        auto="AutoModelForImageTextToText",
        ignore=("re:visual.*",),
    ),
}
"""Models with a vision tower, which is not quantized. Names on disk are not those of vLLM."""
