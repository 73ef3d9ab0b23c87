# SPDX-License-Identifier: Apache-2.0
"""Results of ``explain``, as values and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm.compressed_linear.checkpoint.completeness import Severity
from vllm.compressed_linear.commands.explain.findings import About, Finding
from vllm.compressed_linear.commands.explain.left import LeftToVllm
from vllm.compressed_linear.commands.text import compress_all
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
    """All output of ``explain``. ``left``: linear layers and experts that vLLM's own code runs;
    ``others``: other modules with weights. ``stated``: findings that are not of a single layer's
    choice of a backend. ``rates``: where those of this machine's CPU come from, by which
    instruction sets are chosen."""

    model: str
    architecture: str
    quant_method: str
    platform: str
    tp_size: int
    this_machine: bool = True
    rates: str = ""
    dtype: str = ""
    model_class: str = ""
    weights_read: bool = False
    tensors: int = 0
    file_bytes: int = 0
    layers: list[LayerPlan] = field(default_factory=list)
    left: list[LeftToVllm] = field(default_factory=list)
    others: list[LeftToVllm] = field(default_factory=list)
    stated: list[Finding] = field(default_factory=list)

    def say(
        self,
        severity: Severity,
        about: About,
        message: str,
        names: tuple[str, ...] = (),
    ) -> None:
        """Add a finding."""
        self.stated.append(Finding(severity, about, message, names))

    @property
    def findings(self) -> list[Finding]:
        """Everything that was found, errors first. Layers without a backend have a finding each,
        equal refusals of vLLM's one together."""
        found = [*self.stated, *self._without_backend(), *self._refused()]
        order = list(Severity)
        return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.severity))

    @property
    def errors(self) -> list[str]:
        """Why loading would fail here, in the likely and the certain cases."""
        messages = [f.message for f in self.findings if f.severity is Severity.ERROR]
        return list(dict.fromkeys(messages))

    @property
    def notes(self) -> list[str]:
        """Warnings and notes."""
        return [f.message for f in self.findings if f.severity is not Severity.ERROR]

    def _without_backend(self) -> list[Finding]:
        return [
            Finding(Severity.ERROR, About.SERVING, part.error, (layer.name,))
            for layer in self.layers
            for case in (layer.likely, *(cases[0] for _, cases in layer.other_ranks))
            for part in case.parts
            if part.error
        ]

    def _refused(self) -> list[Finding]:
        same: dict[str, list[str]] = {}
        for left in self.left:
            if left.refusal:
                same.setdefault(left.refusal, []).append(left.name)
        return [
            Finding(
                Severity.ERROR,
                About.SERVING,
                f"{', '.join(compress_all(names))}: vLLM's own code cannot run it here: {why}",
                tuple(names),
            )
            for why, names in same.items()
        ]

    def bytes_checkpoint(self) -> int:
        """Bytes in the checkpoint of the layers that would run here, on rank 0."""
        return sum(p.bytes_checkpoint for layer in self.layers for p in layer.likely.parts)

    def bytes_prepared(self) -> int | None:
        """The same after preparation; None if a backend does not know."""
        sizes = [p.bytes_prepared for layer in self.layers for p in layer.likely.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values. Layers that differ by name only share an entry; ``runs`` has
        every module with weights by its name."""
        data = asdict(replace(self, layers=[], stated=[]))
        del data["stated"]
        groups: dict[LayerPlan, list[str]] = {}
        for layer in self.layers:
            groups.setdefault(replace(layer, name=""), []).append(layer.name)
        data["layers"] = [_layers_json(plan, names) for plan, names in groups.items()]
        data["runs"] = self._runs()
        data["findings"] = [asdict(finding) for finding in self.findings]
        data["errors"] = self.errors
        data["notes"] = self.notes
        data["bytes_checkpoint"] = self.bytes_checkpoint()
        data["bytes_prepared"] = self.bytes_prepared()
        return data

    def _runs(self) -> dict[str, dict[str, Any]]:
        """Module → who runs it (this package with a backend, or vLLM with a method) and its bytes
        in the files: of this rank, or of all ranks if it is vLLM's."""
        found: dict[str, dict[str, Any]] = {}
        for layer in self.layers:
            parts = layer.likely.parts
            found[layer.name] = {
                "by": "compressed_linear",
                "with": list(dict.fromkeys(part.runs for part in parts)),
                "reason": "",
                "nbytes": sum(part.bytes_checkpoint for part in parts),
            }
        for left in (*self.left, *self.others):
            found[left.name] = {
                "by": "vllm",
                "with": [left.method or left.kind],
                "reason": left.reason,
                "nbytes": left.nbytes,
            }
        return found


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
