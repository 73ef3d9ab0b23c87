# SPDX-License-Identifier: Apache-2.0
"""Entries of compressed-tensors' configurations that select modules
(compressed_tensors ``utils/match.py``; vLLM's ``compressed_tensors/utils.py``)."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.compressed_linear.formats.entries import Entries
from vllm.compressed_linear.formats.resolution import LayerKind

MODULE_CLASS = {
    LayerKind.LINEAR: "Linear",
    LayerKind.HEAD: "Linear",
    LayerKind.EMBEDDING: "Embedding",
}
"""Class of the module during quantization, for targets that name classes."""

_CLASSES = {
    LayerKind.LINEAR: ("Linear",),
    LayerKind.HEAD: ("Linear", "ParallelLMHead"),
    LayerKind.EMBEDDING: ("Embedding", "VocabParallelEmbedding"),
}
"""Classes whose names vLLM finds a target in: what all of its layers of a kind are called."""


class Targets(Entries):
    """Names of modules, ``re:`` and an expression that matches from their beginning, or classes.

    Renaming may break an expression, so expressions are also compared as they were written.
    """

    def keeps(self, spelling: str) -> bool:
        return spelling.startswith("re:")

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        if kind is not None and spelling == MODULE_CLASS[kind]:
            return True
        if spelling.startswith("re:"):
            return self.expressions.matches(spelling[3:], names, spelling)
        return spelling in names

    def matching(self, names: Sequence[str], kind: LayerKind) -> list[str]:
        """The targets, as written, that select a module, in vLLM's order: names and expressions as
        the configuration lists them, then classes and parts of their names. The library has another
        one (names, expressions in the order of their text), so tensors of the files decide where
        they can."""
        found = [entry for s, entry in self.spellings.items() if self.select(s, names, None)]
        found += [entry for s, entry in self.spellings.items() if names_class(s, kind)]
        return list(dict.fromkeys(found))

    def unmatched(self, modules: Sequence[tuple[Sequence[str], LayerKind | None]]) -> list[str]:
        kinds = {kind for _, kind in modules if kind is not None}
        return [
            entry
            for entry in super().unmatched(modules)
            if not entry.endswith("Attention") and not any(names_class(entry, k) for k in kinds)
        ]

    def classes(self) -> list[str]:
        """Targets that may be names of classes of linear layers."""
        return [
            s
            for s in self.spellings
            if s.isidentifier() and s[0].isupper() and not s.endswith("Attention")
        ]


def names_class(target: str, kind: LayerKind) -> bool:
    """Whether a target is the class of a layer, or a part of its name, as in vLLM."""
    if target.startswith("re:") or not target.isidentifier():
        return False
    return any(target.lower() in name.lower() for name in _CLASSES[kind])
