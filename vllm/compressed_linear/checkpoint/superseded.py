# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint's files that must not be loaded, since others count in their place.

vLLM loads all tensors of all files in the order in which it reads them, so the last one would win.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from vllm.compressed_linear.checkpoint.completeness import Finding, Severity, shortened


@dataclass(frozen=True)
class Superseded:
    """``copies``: tensors that several files hold: name → (the file that the index means, the
    others). ``plain``: plain weights that were left next to the codes of their module."""

    copies: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    plain: frozenset[str] = frozenset()

    def findings(self) -> list[Finding]:
        """One warning for each of the two kinds."""
        found = []
        if self.copies:
            meant, others = next(iter(self.copies.values()))
            text = (
                f"{', '.join(others)} holds {shortened(self.copies)} too, which the index says is "
                f"in {meant}; the index decides"
            )
            found.append(Finding(Severity.WARNING, text, tuple(self.copies)))
        if self.plain:
            names = sorted(self.plain)
            text = (
                f"the files hold plain weights of quantized modules too: {shortened(names)}; "
                "the quantized ones are loaded, the plain ones are not"
            )
            found.append(Finding(Severity.WARNING, text, tuple(names)))
        return found

    def left(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights`` of all files without those that do not count."""
        seen: set[str] = set()
        for name, weight in weights:
            if name in self.plain or name in seen:
                continue
            if name in self.copies:
                seen.add(name)
                yield name, _read(name, self.copies[name][0])
            else:
                yield name, weight


def _read(name: str, file: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor
