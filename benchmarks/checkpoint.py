# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of Llama's shapes with synthetic weights, in the formats of public quantizers.

    python -m benchmarks.checkpoint llama-3.2-1b gptq DIRECTORY

Speed does not depend on what the weights are, so codes are random, with scales that keep the
activations finite. One file for each layer is written as it is made, so that memory is bounded by
the largest tensor. Weights of a linear keep the range that an initialised model has; the model
says nothing sensible.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.formats.awq import awq_gemm_scheme
from vllm.compressed_linear.formats.compressed_tensors_schemes import pack_quantized_scheme
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.spec.scheme import StandardWeights

Tensors = dict[str, torch.Tensor]
GROUP = 128


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model, as its configuration names them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """(name within a layer, N, K) of a layer's linears."""
        hidden, wide = self.hidden_size, self.intermediate_size
        kv = hidden // self.num_attention_heads * self.num_key_value_heads
        yield "self_attn.q_proj", hidden, hidden
        yield "self_attn.k_proj", kv, hidden
        yield "self_attn.v_proj", kv, hidden
        yield "self_attn.o_proj", hidden, hidden
        yield "mlp.gate_proj", wide, hidden
        yield "mlp.up_proj", wide, hidden
        yield "mlp.down_proj", hidden, wide


SHAPES = {
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256, True),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256, False),
}


def _int4(n: int, k: int, generator: torch.Generator) -> StandardWeights:
    """Random 4-bit codes about 8 whose products have the variance of one input."""
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    spread = 0.5 + torch.rand(n, k // GROUP, generator=generator)
    scale = (spread / (4.6 * math.sqrt(k))).to(torch.float16)
    return StandardWeights(codes, scale, torch.full(scale.shape, 8, dtype=torch.uint8))


def _normal(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, k, generator=generator) / math.sqrt(k)


def _gptq(n: int, k: int, generator: torch.Generator) -> Tensors:
    index = torch.arange(k) // GROUP
    return from_standard_layout(
        gptq_scheme(4, GROUP, version="gptq"), _int4(n, k, generator), index
    )


def _awq(n: int, k: int, generator: torch.Generator) -> Tensors:
    return from_standard_layout(awq_gemm_scheme(GROUP), _int4(n, k, generator))


def _w4a16(n: int, k: int, generator: torch.Generator) -> Tensors:
    weights = _int4(n, k, generator)
    scheme = pack_quantized_scheme(4, GROUP, symmetric=True, group_index=False)
    assert weights.scale is not None
    return from_standard_layout(
        scheme, StandardWeights(weights.codes, weights.scale.bfloat16(), None)
    )


def _int8(n: int, k: int, generator: torch.Generator) -> Tensors:
    wide = _normal(n, k, generator)
    scale = wide.abs().amax(1, keepdim=True) / 127
    return {"weight": (wide / scale).round().to(torch.int8), "weight_scale": scale.bfloat16()}


def _fp8(n: int, k: int, generator: torch.Generator) -> Tensors:
    wide = _normal(n, k, generator)
    scale = wide.abs().amax(1, keepdim=True) / 448
    return {"weight": (wide / scale).to(torch.float8_e4m3fn), "weight_scale": scale.bfloat16()}


def _compressed_tensors(
    form: str, bits: int, kind: str, activations: dict[str, Any] | None, group: int | None = None
) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": False,
    }
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


def _tokens(kind: str) -> dict[str, Any]:
    """Activations that are quantized dynamically per token."""
    return {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }


@dataclass(frozen=True)
class Format:
    """How linears are stored. ``dtype``: that of everything else, and what vLLM shall run."""

    linear: Callable[[int, int, torch.Generator], Tensors]
    config: dict[str, Any] | None = None
    dtype: str = "bfloat16"


def _plain(dtype: torch.dtype) -> Callable[[int, int, torch.Generator], Tensors]:
    return lambda n, k, generator: {"weight": _normal(n, k, generator).to(dtype)}


FORMATS = {
    "bf16": Format(_plain(torch.bfloat16)),
    "fp16": Format(_plain(torch.float16), dtype="float16"),
    "gptq": Format(
        _gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
        },
    ),
    "awq": Format(
        _awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
    "w4a16": Format(_w4a16, _compressed_tensors("pack-quantized", 4, "int", None, GROUP)),
    "w8a8": Format(_int8, _compressed_tensors("int-quantized", 8, "int", _tokens("int"))),
    "fp8": Format(_fp8, _compressed_tensors("float-quantized", 8, "float", _tokens("float"))),
}


def config(shape: Shape, form: Format) -> dict[str, Any]:
    """The model's ``config.json``."""
    found: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **vars(shape),
        "head_dim": shape.hidden_size // shape.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": form.dtype,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return found if form.config is None else found | {"quantization_config": form.config}


def files(shape: Shape, form: Format) -> Iterator[Tensors]:
    """The tensors of each file: embedding and head, then one layer at a time."""
    dtype: torch.dtype = getattr(torch, form.dtype)
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(shape.hidden_size, dtype=dtype)

    def table() -> torch.Tensor:
        found = torch.empty(shape.vocab_size, shape.hidden_size, dtype=dtype)
        for rows in found.split(4096):
            rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
        return found

    yield {"model.embed_tokens.weight": table(), "model.norm.weight": ones}
    if not shape.tie_word_embeddings:
        yield {"lm_head.weight": table()}
    for index in range(shape.num_hidden_layers):
        layer = f"model.layers.{index}"
        tensors = {
            f"{layer}.{name}.weight": ones.clone()
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        for name, n, k in shape.linears():
            for key, value in form.linear(n, k, generator).items():
                tensors[f"{layer}.{name}.{key}"] = value.contiguous()
        yield tensors


def write_tokenizer(directory: Path, vocabulary: int) -> None:
    """A tokenizer with a word for each id: benchmarks send ids and want text back."""
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(directory / "tokenizer.json"))
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "t0",
        "eos_token": "t1",
        "unk_token": "t0",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(configuration))


def write(shape: Shape, form: Format, directory: Path) -> None:
    """Writes the whole checkpoint into ``directory``, which is made if need be."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(shape, form), indent=1))
    write_tokenizer(directory, shape.vocab_size)
    count = shape.num_hidden_layers + (1 if shape.tie_word_embeddings else 2)
    places: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(files(shape, form), 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    if arguments.directory.exists():
        sys.exit(f"{arguments.directory} exists already")
    write(SHAPES[arguments.shape], FORMATS[arguments.format], arguments.directory)


if __name__ == "__main__":
    main()
