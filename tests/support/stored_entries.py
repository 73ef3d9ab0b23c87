# SPDX-License-Identifier: Apache-2.0
"""What is in a prepared-weights cache, and what was prepared for it."""

from __future__ import annotations

from pathlib import Path

import torch

from vllm.compressed_linear.prepare.cache.store import SUFFIX


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"*{SUFFIX}"))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )
