# SPDX-License-Identifier: Apache-2.0
"""The small quantized checkpoints, and what their makers' libraries say of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.repository import ROOT

COPIES = ROOT / "tests" / "fixtures"


def zoo() -> Path:
    """The directory of small checkpoints: ``COMPRESSED_LINEAR_ZOO``, one beside the repository, or
    the copies in ``tests/fixtures`` (fewer formats, the same files)."""
    named = os.environ.get("COMPRESSED_LINEAR_ZOO")
    if named:
        if not (Path(named) / "INDEX.json").is_file():
            raise pytest.UsageError(f"COMPRESSED_LINEAR_ZOO={named} holds no INDEX.json")
        return Path(named)
    beside = ROOT.parent / "shared" / "zoo"
    return beside if (beside / "INDEX.json").is_file() else COPIES


def index() -> list[dict[str, Any]]:
    """The entries of the zoo's INDEX.json: dir, tool, quant_method, bits, group_size, ..."""
    return json.loads((zoo() / "INDEX.json").read_text())


def checkpoints(*prefixes: str) -> list[str]:
    """Names of the checkpoints that are there and start with one of ``prefixes`` (none: all)."""
    names = sorted(entry["dir"] for entry in index())
    return [name for name in names if not prefixes or name.startswith(prefixes)]


def checkpoint(name: str) -> Path:
    """The directory of one checkpoint; skips the test if this copy of the zoo lacks it."""
    path = zoo() / name
    if not path.is_dir():
        pytest.skip(f"checkpoint {name} is not in {zoo()}")
    return path


def checkpoint_tensors(name: str) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint by their names on disk."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint(name).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def checkpoint_reference(name: str) -> dict[str, torch.Tensor]:
    """``input_ids``, ``logits``, and for each linear ``.corner``, ``.rowsum`` and ``.colsum``."""
    return load_file(checkpoint(name) / "reference" / "reference.safetensors")


def assert_matches_reference(
    weight: torch.Tensor, reference: dict[str, torch.Tensor], linear: str
) -> None:
    """Compare a dequantized fp32 weight [N, K] with the corner and sums the quantizer's own library
    gave; sums may differ by their own fp32 rounding."""
    wide = weight.double()
    torch.testing.assert_close(
        weight[:8, :64],
        reference[f"{linear}.corner"],
        rtol=2e-7,
        atol=1e-12,
        msg=f"{linear}.corner",
    )
    for name, dim in (("rowsum", 1), ("colsum", 0)):
        error = (wide.sum(dim) - reference[f"{linear}.{name}"].double()).abs()
        allowed = 2.0**-22 * wide.abs().sum(dim) + 1e-12
        assert bool((error <= allowed).all()), (
            f"{linear}.{name}: {float((error / allowed).max()):.3g} times the allowed error"
        )
