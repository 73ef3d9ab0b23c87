# SPDX-License-Identifier: Apache-2.0
"""Results of ``explain``, as values and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm.compressed_linear.commands.explain.layers import LeftToVllm
from vllm.compressed_linear.prepare.plan import Rejection
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor


@dataclass(frozen=True)
class PartPlan:
    """A run of shards of a layer that one backend computes, and the choice for it.

    ``shards``: last components of their names. ``backend`` is empty before the choice, and if no
    backend may run the part; then ``error`` says why. ``bytes_prepared`` is None if the backend
    does not know it beforehand. ``untested_on_hardware``: backends that could run it, perhaps the
    chosen one, and have never run on such hardware. ``notes``: on its data, if it was read.
    """

    start: int
    shards: tuple[str, ...]
    descriptor: CompressedLinearDescriptor
    bytes_checkpoint: int
    backend: str = ""
    variant: str = ""
    chosen_by: str = ""
    bytes_prepared: int | None = None
    rejected: tuple[Rejection, ...] = ()
    untested_on_hardware: tuple[str, ...] = ()
    error: str = ""
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> str:
        """Backend and code path."""
        return f"{self.backend} ({self.variant})" if self.variant else self.backend or "nothing"


@dataclass(frozen=True)
class Possibility:
    """The parts of a layer if one of ``facts`` holds (each a sentence; empty: it is certain).

    ``likely``: true if the configuration is right. ``uniform``: one of the facts is the same for
    all shards. ``from_sample``: the order was assumed and K depends on the real one.
    """

    facts: tuple[str, ...]
    likely: bool
    parts: tuple[PartPlan, ...]
    uniform: bool = True
    from_sample: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """One layer on rank 0, the likely case first; ``other_ranks``: ranks that differ."""

    name: str
    kind: str
    cases: tuple[Possibility, ...]
    unquantized: tuple[str, ...] = ()
    note: str = ""
    other_ranks: tuple[tuple[int, tuple[Possibility, ...]], ...] = ()

    @property
    def likely(self) -> Possibility:
        return self.cases[0]


@dataclass
class Explanation:
    """All output of ``explain``."""

    model: str
    architecture: str
    quant_method: str
    platform: str
    tp_size: int
    this_machine: bool = True
    dtype: str = ""
    model_class: str = ""
    weights_read: bool = False
    file_bytes: int = 0
    layers: list[LayerPlan] = field(default_factory=list)
    left: list[LeftToVllm] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """Why loading would fail, one message per layer, for likely and certain cases."""
        ranks = [case_list[0] for layer in self.layers for _, case_list in layer.other_ranks] + [
            layer.likely for layer in self.layers
        ]
        errors = [p.error for case in ranks for p in case.parts if p.error]
        if self.this_machine:
            first: dict[str, str] = {}
            for left in self.left:
                first.setdefault(left.refusal, left.name)
            errors += [f"{name} and equal layers: {why}" for why, name in first.items() if why]
        return list(dict.fromkeys(errors))

    def bytes_checkpoint(self) -> int:
        """Bytes in the checkpoint of the layers that would run here, on rank 0."""
        return sum(p.bytes_checkpoint for layer in self.layers for p in layer.likely.parts)

    def bytes_prepared(self) -> int | None:
        """The same after preparation; None if a backend does not know."""
        sizes = [p.bytes_prepared for layer in self.layers for p in layer.likely.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values. Layers that differ by name only share an entry."""
        data = asdict(replace(self, layers=[]))
        groups: dict[LayerPlan, list[str]] = {}
        for layer in self.layers:
            groups.setdefault(replace(layer, name=""), []).append(layer.name)
        data["layers"] = [_layers_json(plan, names) for plan, names in groups.items()]
        data["errors"] = self.errors
        data["bytes_checkpoint"] = self.bytes_checkpoint()
        data["bytes_prepared"] = self.bytes_prepared()
        return data


def _layers_json(plan: LayerPlan, names: list[str]) -> dict[str, Any]:
    def plain(found: tuple[Possibility, ...]) -> list[dict[str, Any]]:
        out = []
        for case in found:
            entry = asdict(case)
            for part, data in zip(case.parts, entry["parts"], strict=True):
                data["descriptor"] = str(part.descriptor)
                data["fields"] = part.descriptor.to_json()
            out.append(entry)
        return out

    return {
        "names": names,
        "kind": str(plan.kind),
        "unquantized": list(plan.unquantized),
        "note": plan.note,
        "cases": plain(plan.cases),
        "other_ranks": {str(rank): plain(found) for rank, found in plan.other_ranks},
    }
