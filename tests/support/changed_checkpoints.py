# SPDX-License-Identifier: Apache-2.0
"""Copies of the small checkpoints with other tensors or another configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.checkpoints import checkpoint, checkpoint_tensors

Tensors = dict[str, torch.Tensor]


def changed_copy(
    name: str,
    directory: Path,
    tensors: Callable[[Tensors], object] = lambda tensors: None,
    quantization: Callable[[dict[str, Any]], object] = lambda config: None,
    *,
    pickled: bool = False,
) -> Path:
    """A copy in ``directory`` whose tensors and quantization_config were changed in place.

    ``pickled``: as pytorch_model.bin, of which no headers are known.
    """
    loose = checkpoint_tensors(name)
    tensors(loose)
    loose = {key: value.contiguous() for key, value in loose.items()}
    if pickled:
        torch.save(loose, directory / "pytorch_model.bin")
    else:
        save_file(loose, directory / "model.safetensors")
    described = json.loads((checkpoint(name) / "config.json").read_text())
    quantization(described["quantization_config"])
    (directory / "config.json").write_text(json.dumps(described))
    for file in checkpoint(name).glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory
