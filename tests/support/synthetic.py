# SPDX-License-Identifier: Apache-2.0
"""Small random quantized models of any shape, written as checkpoints, with the fp32 logits that
the transformers library computes from their dequantized weights.

For shapes the zoo does not have: groups cut by a shard border, one kv head, odd vocabularies,
layers fused on disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.formats.awq import awq_gemm_scheme
from vllm.compressed_linear.formats.compressed_tensors_schemes import pack_quantized_scheme
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StandardWeights


@dataclass(frozen=True)
class Quant:
    """How one linear is quantized. ``form``: "gptq", "awq" or "ct"."""

    form: str
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    act_order: bool = False

    def scheme(self) -> CheckpointScheme:
        if self.form == "awq":
            return awq_gemm_scheme(self.group_size)
        if self.form == "ct":
            return pack_quantized_scheme(
                self.bits, self.group_size, symmetric=self.symmetric, group_index=False
            )
        return gptq_scheme(self.bits, self.group_size, version="gptq_v2")


@dataclass
class Model:
    """A tiny Llama or Phi-3. ``overrides``: last name part of a linear → its Quant, or None for
    unquantized ones."""

    quant: Quant
    architecture: str = "LlamaForCausalLM"
    hidden: int = 128
    intermediate: int = 256
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 512
    layers: int = 1
    overrides: dict[str, Quant | None] = field(default_factory=dict)
    seed: int = 0
    bias: bool = False

    @property
    def hf_config(self) -> dict[str, Any]:
        config = {
            "architectures": [self.architecture],
            "model_type": "phi3" if self.architecture.startswith("Phi3") else "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "max_position_embeddings": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if self.architecture.startswith("Llama"):
            config |= {"attention_bias": self.bias, "mlp_bias": False}
        else:
            config |= {"original_max_position_embeddings": 128, "sliding_window": None}
        return config

    def quantization_config(self) -> dict[str, Any]:
        quant, excluded = self.quant, [n for n, q in self.overrides.items() if q is None]
        if quant.form == "awq":
            return {
                "quant_method": "awq",
                "bits": 4,
                "group_size": quant.group_size,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": excluded,
            }
        if quant.form == "gptq":
            rules: dict[str, Any] = {f"-:.*{name}$": {} for name in excluded}
            for name, other in self.overrides.items():
                if other is not None:
                    rules[f"+:.*{name}$"] = {"bits": other.bits, "group_size": other.group_size}
            return {
                "quant_method": "gptq",
                "bits": quant.bits,
                "group_size": quant.group_size,
                "desc_act": quant.act_order,
                "sym": quant.symmetric,
                "checkpoint_format": "gptq_v2",
                "dynamic": rules,
            }

        def group(targets: list[str], q: Quant) -> dict[str, Any]:
            weights = {
                "num_bits": q.bits,
                "type": "int",
                "symmetric": q.symmetric,
                "strategy": "channel" if q.group_size == -1 else "group",
                "group_size": None if q.group_size == -1 else q.group_size,
            }
            return {"targets": targets, "weights": weights, "format": "pack-quantized"}

        groups = {
            f"group_{i}": group([f"re:.*{name}$"], q)
            for i, (name, q) in enumerate(self.overrides.items())
            if q is not None
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "version": "0.19.0",
            "quantization_status": "compressed",
            "config_groups": groups | {"group_last": group(["Linear"], quant)},
            "ignore": ["lm_head", *(f"re:.*{name}$" for name in excluded)],
        }


def random_weight(
    quant: Quant, n: int, k: int, generator: torch.Generator, order: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A random weight as checkpoint tensors, and what it means: fp32 [n, k]."""
    scheme = quant.scheme()
    size = k if quant.group_size == -1 else quant.group_size
    groups = -(-k // size)
    codes = torch.randint(0, 1 << quant.bits, (n, k), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, groups, generator=generator) * 0.02 + 0.01
    scale = (scale * 4 / 2**quant.bits).to(torch.float16)
    middle = 1 << (quant.bits - 1)
    zero = torch.full((n, groups), middle, dtype=torch.uint8)
    if not quant.symmetric:
        zero = torch.randint(
            middle - 1, middle + 2, (n, groups), generator=generator, dtype=torch.uint8
        )
    index = torch.arange(k) // size
    if order is not None:
        index = index[order]
    has_index = any(t.role is Role.GROUP_INDEX for t in scheme.tensors)
    tensors = from_standard_layout(
        scheme,
        StandardWeights(codes, scale, None if quant.form == "ct" and quant.symmetric else zero),
        index if has_index else None,
    )
    ideal = (codes.float() - zero.float()[:, index]) * scale.float()[:, index]
    return tensors, ideal


def write(model: Model, path: Path) -> dict[str, torch.Tensor]:
    """Write the checkpoint; returns ``input_ids`` [2, 12] and fp32 ``logits`` of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(model.seed)
    generator = torch.Generator().manual_seed(model.seed)
    config = AutoConfig.for_model(**model.hf_config)
    ideal = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    tensors: dict[str, torch.Tensor] = {}
    # Shared by the members of a fused layer, as a quantizer's Hessian order is.
    orders = {k: torch.randperm(k, generator=generator) for k in (model.hidden, model.intermediate)}
    with torch.no_grad():
        for name, parameter in ideal.named_parameters():
            module, _, kind = name.rpartition(".")
            last = module.rpartition(".")[2]
            quant = model.overrides.get(last, model.quant)
            if last.endswith("_proj") and kind == "weight" and quant is not None:
                n, k = parameter.shape
                order = orders[k] if quant.act_order else None
                stored, meaning = random_weight(quant, n, k, generator, order)
                tensors |= {f"{module}.{key}": value for key, value in stored.items()}
                parameter.copy_(meaning)
            else:
                if parameter.ndim == 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
                elif kind == "bias":
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
                tensors[name] = parameter.detach().clone()
        input_ids = torch.randint(3, model.vocab, (2, 12), generator=generator)
        logits = ideal(input_ids).logits.float()
    path.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
    full = model.hf_config | {"quantization_config": model.quantization_config()}
    (path / "config.json").write_text(json.dumps(full))
    return {"input_ids": input_ids, "logits": logits}
