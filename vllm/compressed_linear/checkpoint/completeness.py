# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint and a model fit each other: findings about what is left over on either side.

The same findings are made while a model loads and, from headers alone, before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.settings import ALLOW_MISSING

NAMED = 6
"""Number of names (each standing for those that differ in numbers only) that a message has."""


class IncompleteCheckpointError(CheckpointError):
    """Parameters of the model have no values from the checkpoint."""


class Severity(StrEnum):
    """``ERROR``: loading must fail, or would compute wrong numbers. ``NOTE``: not known."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One sentence about a checkpoint, and the names it is about, all of them."""

    severity: Severity
    message: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unfilled:
    """A parameter that the checkpoint fills in part or not at all.

    ``expected``: names of the tensors that are missing, as they would be called in the files;
    empty if not known. ``filled_by``: tensors that filled the other part. ``part``: what is
    missing of it, in words; empty for all of it. ``unused``: tensors of the same module in the
    files that nothing took.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    expected: tuple[str, ...] = ()
    filled_by: tuple[str, ...] = ()
    part: str = ""
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        described = f"{self.dtype} [{', '.join(map(str, self.shape))}]"
        text = f"{self.name} ({described}"
        if self.part:
            text += f", {self.part}"
        if self.expected and self.expected != (self.name,):
            text += f", expected {shortened(self.expected, 3)}"
        if self.filled_by:
            text += f"; the rest came from {shortened(self.filled_by, 3)}"
        if self.unused:
            text += f"; the files hold {shortened(self.unused, 3)}, which this layer does not take"
        return text + ")"


def missing(
    unfilled: Sequence[Unfilled], model: str, checkpoint: str, *, allowed: bool = False
) -> list[Finding]:
    """One finding about all parameters of the class ``model`` that the files of ``checkpoint`` do
    not fill; a warning if the user ``allowed`` them."""
    if not unfilled:
        return []
    by_pattern = _by_pattern([u.name for u in unfilled])
    first = {u.name: u for u in unfilled}
    described = [
        f"{first[names[0]]}" + (f" and {len(names) - 1} like it" if len(names) > 1 else "")
        for names in by_pattern[:NAMED]
    ]
    more = sum(map(len, by_pattern[NAMED:]))
    text = (
        f"{checkpoint} does not fill {_count(unfilled, 'parameter')} of vLLM's {model}: "
        f"{'; '.join(described)}{_more(more)}. The model would compute with whatever was allocated "
        "there. "
    )
    severity = Severity.WARNING
    if allowed:
        text += f"It is loaded regardless, because {ALLOW_MISSING} says so"
    else:
        severity = Severity.ERROR
        text += (
            "Download the files again, or get the tensors from the model that was quantized; "
            f"{ALLOW_MISSING}=1 loads it regardless, with this as a warning"
        )
    return [Finding(severity, text, tuple(u.name for u in unfilled))]


def missing_of_experts(tensors: Sequence[str]) -> list[Finding]:
    """One finding about all ``tensors`` that other experts of their layers have."""
    if not tensors:
        return []
    text = (
        f"the checkpoint has no tensor {shortened(tensors)}, which other experts of the layer have "
        "or the model needs. Download the files again"
    )
    return [Finding(Severity.ERROR, text, tuple(tensors))]


def unlike_experts(tensors: Sequence[str]) -> list[Finding]:
    """One finding about all ``tensors`` of experts that are not like those of most others."""
    if not tensors:
        return []
    text = f"dtype or shape is not that of the other experts of the layer: {shortened(tensors)}"
    return [Finding(Severity.WARNING, text, tuple(tensors))]


def perhaps_biased(tensors: Sequence[str], model: str) -> list[Finding]:
    """One finding about biases, of unknown values, that the class ``model`` takes nothing of."""
    if not tensors:
        return []
    text = (
        f"vLLM's {model} takes nothing of {_count(tensors, 'bias')} of the checkpoint: "
        f"{shortened(tensors)}. The numbers are right only if they are all zero, as some tools "
        "write them"
    )
    return [Finding(Severity.NOTE, text, tuple(tensors))]


def never_arrived(errors: Sequence[CheckpointError]) -> list[Finding]:
    """One finding about all tensors that quantized layers need and that did not arrive: without
    them no weight is left, so nothing can allow it."""
    if not errors:
        return []
    more = f" ({len(errors) - 1} more tensors are missing)" if len(errors) > 1 else ""
    return [Finding(Severity.ERROR, f"{errors[0]}{more}", tuple(map(str, errors)))]


def unused(tensors: Sequence[str], model: str) -> list[Finding]:
    """One warning about all ``tensors`` of the files that the class ``model`` takes nothing of."""
    if not tensors:
        return []
    text = (
        f"vLLM's {model} takes nothing of {_count(tensors, 'tensor')} of the checkpoint: "
        f"{shortened(tensors)}. If the model needs them, its numbers are wrong"
    )
    return [Finding(Severity.WARNING, text, tuple(tensors))]


def unmatched(entries: Sequence[tuple[str, str]]) -> list[Finding]:
    """One warning about all (field, entry) of a configuration that select no module."""
    if not entries:
        return []
    names = [f"{field}: {entry!r}" for field, entry in entries]
    count = "1 entry" if len(names) == 1 else f"{len(names)} entries"
    text = (
        f"{count} of the quantization config match no module of the model: "
        f"{', '.join(names[:NAMED])}{_more(len(names) - NAMED)}. Modules that they were meant for "
        "are treated as if the entries were absent"
    )
    return [Finding(Severity.WARNING, text, tuple(names))]


def shortened(names: Iterable[str], limit: int = NAMED) -> str:
    """``names`` as text; those that differ in numbers only are counted."""
    groups = _by_pattern(names)
    shown = [
        group[0] + (f" and {len(group) - 1} like it" if len(group) > 1 else "")
        for group in groups[:limit]
    ]
    return ", ".join(shown) + _more(sum(map(len, groups[limit:])))


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _count(names: Sequence[object], word: str) -> str:
    plural = word + ("es" if word.endswith("s") else "s")
    return f"{len(names)} {plural if len(names) > 1 else word}"


def _by_pattern(names: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(pattern(name), []).append(name)
    return list(groups.values())


def expected_names(
    parameter: str,
    filled_by: Sequence[str],
    others: Mapping[str, Sequence[str]],
    packed_modules: Mapping[str, Sequence[str]],
    experts: int = 0,
) -> tuple[str, ...]:
    """Names that the missing tensors of ``parameter`` would have in the files; empty if unknown.

    ``filled_by``: tensors that filled a part of it. ``others``: tensors of the files by the other
    parameter that they filled. ``packed_modules``: vLLM's ``packed_modules_mapping``. ``experts``:
    number of experts of a parameter that holds one slice for each.
    """
    module, _, tensor = parameter.rpartition(".")
    parent, _, last = module.rpartition(".")
    if filled_by:
        return _siblings(filled_by, packed_modules.get(last, ()), experts)
    for other, names in others.items():
        if names and pattern(other) == pattern(parameter):
            renumbered = [_renumber(name, other, parameter) for name in names]
            return tuple(sorted({name for name in renumbered if name}))
    prefix = f"{parent}." if parent else ""
    members = packed_modules.get(last, (last,))
    return tuple(f"{prefix}{member}.{tensor}" if member else tensor for member in members)


def _siblings(names: Sequence[str], members: Sequence[str], experts: int) -> tuple[str, ...]:
    """Tensors that would complete ``names``: other members of the fused layer, other experts."""
    found: set[str] = set()
    for name in names:
        module, _, tensor = name.rpartition(".")
        parent, dot, last = module.rpartition(".")
        if last in members:
            found |= {f"{parent}{dot}{member}.{tensor}" for member in members}
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if numbered := re.fullmatch(r"(.*\.)(\d+)(\..*)", name):  # the last number
            start, number, end = numbered.groups()
            numbers.setdefault((start, end), set()).add(int(number))
    if experts:
        for (start, end), have in numbers.items():
            found |= {f"{start}{number}{end}" for number in set(range(experts)) - have}
    return tuple(sorted(found - set(names)))


def pattern(name: str) -> str:
    """``name`` without its numbers: equal for tensors of like layers."""
    return re.sub(r"\d+", "*", name)


def _renumber(name: str, other: str, parameter: str) -> str | None:
    """``name``, which belongs to ``other``, with the numbers of ``parameter``; None if its numbers
    are not those of ``other``."""
    old, new = re.findall(r"\d+", other), re.findall(r"\d+", parameter)
    have = re.findall(r"\d+", name)
    changed = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    if len(changed) != 1 or have.count(changed[0][0]) != 1:
        return None
    return re.sub(rf"(?<!\d){changed[0][0]}(?!\d)", changed[0][1], name)
