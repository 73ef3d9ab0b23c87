# SPDX-License-Identifier: Apache-2.0
"""Names of modules: from vLLM's fused layers to the checkpoint's single ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def shard_names(prefix: str, packed_modules: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the modules that the layer ``prefix`` fuses, in order; itself if it fuses none.

    ``packed_modules``: a model's ``packed_modules_mapping``, last name part of a fused layer →
    those of its members.
    """
    parent, dot, last = prefix.rpartition(".")
    return [f"{parent}{dot}{member}" for member in packed_modules.get(last, (last,))]


def last_word(module: str) -> str:
    """The last part of a module's name that is no number."""
    return next((part for part in reversed(module.split(".")) if not part.isdigit()), "")
