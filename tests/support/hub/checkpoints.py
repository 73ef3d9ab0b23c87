# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of published configurations: of full size as headers, and small ones with values.

Names and shapes of tensors are those that the transformers library saves for the architecture;
those of quantized modules are what a writer of the tool's format makes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.header_checkpoints import default_config, saved_headers
from tests.support.hub.selection import Published, WriterOf, writers_of
from tests.support.hub.writers import Quantize, Written
from tests.support.repository import ROOT
from tests.support.sparse_checkpoints import write_sparse
from tests.support.tiny_checkpoints import shrunk, write_tiny

TENSORS_OF_A_FILE = 4000
WORDS = 4096
MOST_BYTES = 2**29
"""Of a small model in bfloat16: it is loaded four times, in float32."""
HUB = ROOT / "tests" / "hub" / "published"
_TABLE = re.compile(r"(^|\.)(embed_tokens\w*|wte|pos\w*embed\w*|\w*embeddings?)\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_SAFETENSORS = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_INNER = {"KimiK25ForConditionalGeneration": ("DeepseekV3ForCausalLM", "language_model.")}
"""Architectures that the library does not have → that of their language model, and the prefix of
its names."""
_RENAMES = {
    "Gemma3ForConditionalGeneration": (
        r"vision_tower\.(embeddings|encoder|post_layernorm)",
        r"vision_tower.vision_model.\1",
    )
}
"""(expression, replacement) from the names that the library saves to those of published files."""
_INDEXER = {"n_heads": 16, "kv_heads": 1, "head_dim": 256, "budget": 2048, "compress_ratio": 16}
_MORE: dict[str, dict[str, Any]] = {
    "Gemma4UnifiedForConditionalGeneration": {"vision_config": {}, "audio_config": {}},
    "Glm4MoeForCausalLM": {"head_dim": 128},
    "Qwen4ExpForConditionalGeneration": {
        "text_config": {f"indexer_{key}": size for key, size in _INDEXER.items()}
    },
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8": {
        "text_config": {"interleave_moe_layer_step": 2, "num_local_experts": 128}
    },
}
"""Architectures, and checkpoints by name → what vLLM needs, or is published elsewhere, and the
library's default configuration does not have."""

_DIVISIBLE = {
    "FalconForCausalLM": {
        "hidden_size": 4608,
        "ffn_hidden_size": 4 * 4608,
        "num_attention_heads": 72,
    }
}
"""Sizes that a small twin can be made of, where the published ones (71 heads) cannot be divided."""


@cache
def published() -> dict[str, Published]:
    """Every configuration, by the name of its file."""
    found = {}
    for file in sorted(HUB.glob("*.json")):
        data = json.loads(file.read_text())
        found[file.stem] = Published(
            data["name"],
            data["architecture"],
            data["config"],
            data["side_files"],
            data["tensors"],
        )
    return found


def _model_of(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of the model itself."""
    left_out = ("quantization_config", "compression_config", "auto_map")
    return {k: v for k, v in config.items() if k not in left_out}


def _is_whole(config: dict[str, Any]) -> bool:
    return "model_type" in config and bool({"hidden_size", "text_config"} & config.keys())


def configs(one: Published) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of the checkpoint, and the library's configuration of the class whose tensors it
    has. What is not published is that of another checkpoint of the architecture, or the library's
    default. Raises whatever the library raises."""
    from transformers import CONFIG_MAPPING

    architecture = _INNER.get(one.architecture, (one.architecture, ""))[0]
    built = default_config(architecture)
    model_type = built["model_type"]
    given = _model_of(one.config)
    if not _is_whole(given):
        others = (
            _model_of(o.config) for o in published().values() if o.architecture == one.architecture
        )
        more = _MORE.get(one.name) or _MORE.get(architecture, {})
        given = next(filter(_is_whole, others), more) | given
    if architecture != one.architecture:
        given = _model_of(given.get("text_config", given))
    if given.keys() - {"architectures", "torch_dtype"}:
        built = CONFIG_MAPPING[model_type].from_dict(given | {"model_type": model_type}).to_dict()
    config = one.config if _is_whole(one.config) else built | one.config
    return config | {"architectures": [one.architecture]}, built


def write_headers(one: Published, path: Path) -> None:
    """The checkpoint of full size, whose data is a hole in the file. Raises whatever the library
    raises if it cannot build the model, and ``NotWrittenError``."""
    config, built = configs(one)
    inner, prefix = _INNER.get(one.architecture, (one.architecture, ""))
    headers = saved_headers(inner, built)
    weights = {
        _on_hub(f"{prefix}{name}", one.architecture): torch.empty(
            header.shape, dtype=torch.bfloat16, device="meta"
        )
        for name, header in headers.items()
    }
    writer_of = writers_of(one)
    tensors = {
        name: (_SAFETENSORS[tensor.dtype], list(tensor.shape))
        for written in _written(weights, writer_of, None)
        for name, tensor in written.tensors.items()
    }
    write_sparse(path, config, tensors, files=1 + len(tensors) // TENSORS_OF_A_FILE)
    _write_side_files(one, path)


def _on_hub(name: str, architecture: str) -> str:
    """The name under which published files have a tensor that the library saves otherwise."""
    return re.sub(*_RENAMES[architecture], name) if architecture in _RENAMES else name


def _write_side_files(one: Published, path: Path) -> None:
    for name, content in one.side_files.items():
        (path / name).write_text(json.dumps(content))


Sides = tuple[Quantize | None, Quantize | None]
"""How a layer's input and output are quantized; None where they are not."""


@dataclass(frozen=True)
class _Module:
    """What one tensor of a plain checkpoint becomes, and ``meaning``, in its place in the twin."""

    name: str
    tensors: dict[str, torch.Tensor]
    meaning: torch.Tensor
    sides: Sides = (None, None)
    quantized: bool = False


def _written(
    weights: dict[str, torch.Tensor], writer_of: WriterOf, plain_experts: bool | None
) -> Iterator[_Module]:
    same: dict[Any, Written] = {}  # of tensors without values
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        writer = None
        if weight.ndim == 2 and name.endswith(".weight"):
            writer = writer_of(module, bool(_TABLE.search(name)))
        if writer is None or not writer.takes(*weight.shape):
            yield _Module(name, {name: weight}, weight)
        elif plain_experts and _EXPERT.search(name):
            meaning = writer.write(weight.float())[1].to(weight.dtype)
            yield _Module(name, {name: meaning}, meaning)
        else:
            key = (writer.write, weight.shape)
            written = same.get(key) or writer.write(weight.float())
            if weight.is_meta:
                same[key] = written
            tensors, meaning = written
            found = {f"{module}.{last}": tensor for last, tensor in tensors.items()}
            yield _Module(name, found, meaning, (writer.x, writer.y), quantized=True)


@dataclass(frozen=True)
class Twins:
    """A small checkpoint with a published configuration, and the plain one that it means.

    ``modules``: names of quantized modules on disk → how their input and output are quantized.
    """

    quantized: Path
    plain: Path
    modules: dict[str, Sides]


def write_twins(one: Published, path: Path, factor: int) -> Twins:
    """Both, below ``path``; routed experts are plain in both. Raises as ``write_headers``."""
    writer_of = writers_of(one)
    _, config = configs(one)
    plain = path / "plain"
    config |= _DIVISIBLE.get(one.architecture, {})
    write_tiny(one.architecture, _few_words(shrunk(config, factor)), plain, MOST_BYTES)
    weights = {k: v for file in plain.glob("*.safetensors") for k, v in load_file(file).items()}
    modules: dict[str, Sides] = {}
    tensors: dict[str, torch.Tensor] = {}
    meanings: dict[str, torch.Tensor] = {}
    for module in _written(weights, writer_of, True):
        tensors |= module.tensors
        meanings[module.name] = module.meaning
        if module.quantized:
            modules[module.name.removesuffix(".weight")] = module.sides
    _save(meanings, plain)
    saved = json.loads((plain / "config.json").read_text())
    for place in ("quantization_config", "compression_config"):
        if place in one.config:
            saved[place] = one.config[place]
    quantized = path / "quantized"
    quantized.mkdir()
    (quantized / "config.json").write_text(json.dumps(saved))
    _save(tensors, quantized)
    _write_side_files(one, quantized)
    return Twins(quantized, plain, modules)


def _few_words(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with a small vocabulary: no token is looked up."""
    small = {}
    for key, value in config.items():
        if isinstance(value, dict):
            small[key] = _few_words(value)
        elif type(value) is int and key.startswith("vocab_size"):
            small[key] = min(value, WORDS)
        elif type(value) is int and key == "pad_token_id":
            small[key] = min(value, WORDS - 1)
        else:
            small[key] = value
    return small


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(own, path / "model.safetensors", {"format": "pt"})


def names(chosen: Iterable[str]) -> list[str]:
    """Those of ``chosen`` that are published, sorted."""
    return sorted(set(chosen) & set(published()))
