# SPDX-License-Identifier: Apache-2.0
"""Findings on a checkpoint: what would go wrong, and what is worth knowing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vllm.compressed_linear.checkpoint.completeness import Severity


class About(StrEnum):
    """``CHECKPOINT``: the files, which are the same on every machine. ``SERVING``: vLLM, this
    package and the machine."""

    CHECKPOINT = "checkpoint"
    SERVING = "serving"


@dataclass(frozen=True)
class Finding:
    """One sentence or two; ``names``: of the layers, tensors or entries that it is about. An error
    means that loading fails here."""

    severity: Severity
    about: About
    message: str
    names: tuple[str, ...] = ()
