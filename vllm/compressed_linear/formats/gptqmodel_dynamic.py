# SPDX-License-Identifier: Apache-2.0
"""GPTQModel's ``dynamic``: overrides for modules (gptqmodel ``quantization/config.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from vllm.compressed_linear.formats.entries import Entries, Rename
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.resolution import LayerKind


@dataclass(frozen=True)
class GptqModelDynamic(Entries):
    """An ordered map from regular expressions over full module names to overrides.

    The first pattern that matches from the name's beginning decides. ``-:`` before a pattern
    leaves the module unquantized; ``+:`` may be left out. ``overrides`` has None for the former.
    Patterns are also matched with the checkpoint's names, so they are never renamed.
    """

    overrides: dict[str, Fields | None]

    @classmethod
    def parse(cls, config: Fields) -> Self:
        """The rules of a configuration. Raises ``ConfigError`` for anything but a map of valid
        patterns to maps."""
        overrides: dict[str, Fields | None] = {}
        for key, override in config.fields("dynamic").values.items():
            entry = str(key)
            excluded = entry.startswith("-:")
            overrides[entry] = None if excluded else Fields.of(override, f"dynamic {entry}")
        found = cls("dynamic", {entry: entry for entry in overrides}, overrides)
        for entry in overrides:
            found.expressions.compiled(_bare(entry), entry)
        return found

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        return self.expressions.matches(_bare(spelling), names, spelling)

    def renamed(self, rename: Rename) -> Self:
        return self

    def find(self, names: Sequence[str]) -> tuple[str, Fields | None]:
        """(pattern, overrides) of the first rule that matches one of a module's ``names``.

        Overrides are None if the rule excludes the module; ("", no fields) if no rule matches.
        """
        entry = self.first(names)
        return ("", Fields({})) if entry is None else (entry, self.overrides[entry])


def _bare(entry: str) -> str:
    return entry[2:] if entry[:2] in ("-:", "+:") else entry
