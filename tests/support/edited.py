# SPDX-License-Identifier: Apache-2.0
"""Copies of small checkpoints, of one file each, with tensors dropped or added."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edited(
    checkpoint: Path,
    directory: Path,
    *,
    drop: Collection[str] = (),
    add: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a copy of ``checkpoint`` to ``directory`` without the tensors ``drop`` and with those
    in ``add``."""
    shutil.copytree(checkpoint, directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in drop:
        del tensors[name]
    save_file(tensors | dict(add or {}), file, {"format": "pt"})
    return directory
