# SPDX-License-Identifier: Apache-2.0
"""Small mixtures whose experts are quantized too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.support.architectures import MIXTURE, Checkpoint, Family, write
from tests.support.synthetic import Quant

FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    MIXTURE,
    quantized=r"layers\.\d+\.(self_attn|.*experts\.\d+)\..*\.weight$",
)
QUANTS = {
    "gptq": Quant("gptq"),
    "awq": Quant("awq", symmetric=False),
    "compressed-tensors": Quant("ct"),
}
AUTO_ROUND: dict[str, tuple[str, dict[str, Any]]] = {
    "auto-round": ("gptq", {"packing_format": "auto_round:gptqmodel"}),
    "auto-round-awq": ("awq", {"packing_format": "auto_round:auto_awq", "sym": False}),
}
"""Form of the tensors, and what the configuration says of them."""
FORMS = [*QUANTS, *AUTO_ROUND]
EXPERTS = "model.layers.1.block_sparse_moe.experts"


def checkpoint_in(form: str, path: Path) -> Checkpoint:
    written, changes = AUTO_ROUND.get(form, (form, {}))
    checkpoint = write(FAMILY, QUANTS[written], path, reference=False)
    if changes:
        file = checkpoint.quantized / "config.json"
        config = json.loads(file.read_text())
        kept = {k: config["quantization_config"].get(k) for k in ("bits", "group_size", "sym")}
        config["quantization_config"] = {"quant_method": "auto-round", **kept, **changes}
        file.write_text(json.dumps(config))
    return checkpoint


def store_zeros(path: Path, stored: int, version: str) -> None:
    """Change all zero points of a GPTQ checkpoint, and its version."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["checkpoint_format"] = version
    file.write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    word = int.from_bytes(bytes([stored << 4 | stored] * 4), "little", signed=True)
    for name, tensor in tensors.items():
        if name.endswith(".qzeros"):
            tensor.fill_(word)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
