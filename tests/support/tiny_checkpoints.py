# SPDX-License-Identifier: Apache-2.0
"""Small complete checkpoints of any architecture: a default configuration made smaller, with random
weights, as the transformers library saves it.

The width of every part is divided by one number and the number of heads with it, so sizes that have
to be equal or multiples of each other stay so, and the size of a head is as published.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from tests.support.architectures import wrapped_classes_uncompiled

FACTORS = (8, 4, 2, 1)
"""To be tried in this order until vLLM loads the model: heads may not be divisible, or too few."""
LOADED_INCOMPLETELY_BY_VLLM = {"LagunaForCausalLM"}
"""vLLM 0.32 looks for ``e_score_correction_bias`` of its router under another name than that of the
files, and leaves it at zero."""
LAYERS = 2
EXPERTS = 4
MOST_BYTES = 3 * 2**30
"""A model that is still larger is not worth its time."""

_WIDTHS = re.compile(
    r"\w*(hidden_size|hidden_dim|embed_dim|intermediate_size\w*|ffn_dim|d_inner|attention_heads|"
    r"num_\w*heads|embed_proj_dim)|"
    r"d_model|d_ff|n_embd|n_inner|dim|lru_width|mamba_d_ssm|mamba_n_heads|projection_dim|n_heads?|"
    r"n_kv_heads"
)
_LAYERS = re.compile(
    r"(\w*_)?num_hidden_layers|n_layers?|num_layers|depth|(num_)?(encoder|decoder)_layers"
)
_EXPERTS = re.compile(r"(num|n|moe_num)_(?!.*shared)\w*experts")
_CHOSEN = re.compile(r"num_experts_per_tok\w*|moe_k|top_k_experts|moe_topk|num_selected_experts")
_GROUPS = ("n_group", "topk_group", "n_groups")


def shrunk(config: dict[str, Any], factor: int) -> dict[str, Any]:
    """``config`` with widths and heads divided by ``factor``, few layers and few experts.

    If layers are of several kinds, as many as contain each kind once are left.
    """
    kinds = config.get("layer_types") or config.get("layers_block_type")
    before = next(
        (value for key, value in config.items() if _LAYERS.fullmatch(str(key)) and value), None
    )
    layers = LAYERS
    if isinstance(kinds, list) and kinds:
        layers = max(layers, 1 + max(kinds.index(kind) for kind in set(kinds)))
    small: dict[str, Any] = {}
    for key, value in config.items():
        whole = type(value) is int and type(key) is str  # not a label
        if _of_layers(value):
            small[key] = {k: v for k, v in value.items() if int(k) < layers}
        elif isinstance(value, dict):
            small[key] = shrunk(value, factor)
        elif isinstance(value, list) and before and len(value) == before:
            small[key] = value[:layers]
        elif whole and _LAYERS.fullmatch(key):
            small[key] = min(value, layers)
        elif whole and _EXPERTS.fullmatch(key):
            small[key] = min(value, EXPERTS)
        elif whole and _CHOSEN.fullmatch(key):
            small[key] = min(value, 2)
        elif whole and key in _GROUPS and kinds is None:
            small[key] = min(value, 1)
        elif whole and _WIDTHS.fullmatch(key):
            small[key] = max(1, value // factor)
        else:
            small[key] = value
    return small


def _of_layers(value: Any) -> bool:
    """Whether it has an entry for some of the layers, by their numbers."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(str(k).isdigit() and isinstance(v, dict) for k, v in value.items())
    )


def write_tiny(
    architecture: str, config: dict[str, Any], path: Path, most_bytes: int = MOST_BYTES
) -> None:
    """Build ``architecture`` of the transformers library and save it to ``path`` in bfloat16, with
    values that no parameter has before it is loaded.

    Raises whatever the library raises if it cannot, and ``ValueError`` if the model has more than
    ``most_bytes``.
    """
    import transformers

    cls = getattr(transformers, architecture)
    described = cls.config_class.from_dict(config)
    with wrapped_classes_uncompiled(described):
        with torch.device("meta"):
            nbytes = 2 * sum(p.numel() for p in cls(described).parameters())
        if nbytes > most_bytes:
            raise ValueError(f"{nbytes / 2**30:.1f} GiB of weights")
        model = cls(described).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02 + 0.01)
    model.save_pretrained(path, max_shard_size="100GB")
    saved = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(saved | {"architectures": [architecture]}))
