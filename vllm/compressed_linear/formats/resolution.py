# SPDX-License-Identifier: Apache-2.0
"""Answers of a format about one module of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vllm.compressed_linear.spec.scheme import CheckpointScheme


class ConfigError(ValueError):
    """A checkpoint's quantization configuration is incomplete, unknown or contradictory."""


class LayerKind(StrEnum):
    """Kinds of layers a format is asked about."""

    LINEAR = "linear"
    HEAD = "lm_head"
    EMBEDDING = "embedding"


@dataclass(frozen=True)
class Unquantized:
    """The checkpoint holds the module's weight unquantized; ``reason``: by which rule."""

    reason: str = ""


@dataclass(frozen=True)
class Delegated:
    """The module is left to vLLM's own implementation, and why."""

    reason: str


Resolution = CheckpointScheme | Unquantized | Delegated
