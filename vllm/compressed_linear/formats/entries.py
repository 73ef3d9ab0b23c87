# SPDX-License-Identifier: Apache-2.0
"""Entries of a configuration that select modules: exclusions, targets, overrides.

Models rename their weights while they load, so one entry may be compared under several spellings. A
match is always reported as the entry that was written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from vllm.compressed_linear.formats.expressions import TimedMatching
from vllm.compressed_linear.formats.resolution import LayerKind

Rename = Callable[[str], str | None]
"""Map a name in the checkpoint to vLLM's; None if vLLM drops it."""

TENSOR = ".weight"
"""End of the name of a tensor that every module may have."""


class ModuleNames(tuple[str, ...]):
    """Names of one module. ``fused``: the layers in which vLLM fuses it → all of their members."""

    fused: Mapping[str, Sequence[str]]

    def __new__(
        cls, names: Iterable[str], fused: Mapping[str, Sequence[str]] | None = None
    ) -> ModuleNames:
        self = super().__new__(cls, names)
        self.fused = fused or {}
        return self


@dataclass(frozen=True)
class Entries(ABC):
    """All entries of one field. Subclasses define when an entry selects a module.

    ``field``: the field's name in the configuration. ``spellings``: text that is compared with
    module names → the entry as written.
    """

    field: str
    spellings: dict[str, str]

    @cached_property
    def expressions(self) -> TimedMatching:
        """Matches the entries that are regular expressions, in bounded time."""
        return TimedMatching(self.field)

    @classmethod
    def of(cls, field: str, entries: Iterable[str]) -> Self:
        """Parse ``entries`` of a configuration."""
        return cls(field, {entry: entry for entry in entries})

    @abstractmethod
    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        """Whether an entry selects a module. ``names``: vLLM's name of the module and, where it
        differs, the checkpoint's (``FileView.names_of``). ``kind``: None where it is not known."""

    def select(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        """Whether an entry selects a module by its own names, or is written for the layer in which
        vLLM fuses it: ``v_proj$`` ends ``qkv_proj`` too, but is written for one of its members."""
        if self.selects(spelling, names, kind):
            return True
        fused = names.fused if isinstance(names, ModuleNames) else {}
        return any(
            self.selects(spelling, (layer,), None)
            and not any(self.selects(spelling, (member,), None) for member in members)
            for layer, members in fused.items()
        )

    def keeps(self, spelling: str) -> bool:
        """Whether a spelling is still compared after it was renamed."""
        return False

    def __bool__(self) -> bool:
        return bool(self.spellings)

    def first(self, names: Sequence[str], kind: LayerKind | None = None) -> str | None:
        """The first entry, as written, that selects a module; None if none does."""
        for spelling, entry in self.spellings.items():
            if self.select(spelling, names, kind):
                return entry
        return None

    def renamed(self, rename: Rename) -> Self:
        """The same entries for the names that ``rename`` gives."""
        spellings = {}
        for spelling, entry in self.spellings.items():
            if self.keeps(spelling):
                spellings[spelling] = entry
            if new := rename(spelling):
                spellings[new] = entry
            # Renaming is defined for tensors, and may be for whole components of their names only.
            tensor = rename(f"{spelling}{TENSOR}") or ""
            if tensor.endswith(TENSOR) and tensor != TENSOR:
                spellings.setdefault(tensor.removesuffix(TENSOR), entry)
        kept = {s: entry for s, entry in self.spellings.items() if self.keeps(s)}
        return replace(self, spellings=spellings | kept)

    def unmatched(self, modules: Sequence[tuple[Sequence[str], LayerKind | None]]) -> list[str]:
        """Entries, as written, that select none of ``modules``, each given by names and kind."""
        matched: set[str] = set()
        for spelling, entry in self.spellings.items():
            if entry not in matched and any(self.select(spelling, *module) for module in modules):
                matched.add(entry)
        return [entry for entry in dict.fromkeys(self.spellings.values()) if entry not in matched]


class PartsOfNames(Entries):
    """Entries that select every module of which a name contains them."""

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        return any(spelling in name for name in names)


class Components(Entries):
    """Entries that select the modules whose names have them as one or more whole components:
    ``mlp.gate`` selects ``layers.0.mlp.gate``, and not ``layers.0.mlp.gate_proj``."""

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        part = f".{spelling.removesuffix(TENSOR).strip('.')}."
        return any(part in f".{name}." for name in names)

    def names_fully(self, names: Sequence[str]) -> bool:
        """Whether an entry is a full name of a module, or of a layer in which vLLM fuses it."""
        fused = names.fused if isinstance(names, ModuleNames) else {}
        return any(spelling.removesuffix(TENSOR) in (*names, *fused) for spelling in self.spellings)
