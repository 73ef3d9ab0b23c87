# SPDX-License-Identifier: Apache-2.0
"""The plan: the chosen backend of each layer, every rejection with its reasons, and costs."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from weakref import ref

from tqdm.auto import tqdm

from vllm.compressed_linear.backends.cpu.int8 import CpuInt8FastBackend
from vllm.compressed_linear.backends.registry import REFERENCE, Selection
from vllm.compressed_linear.backends.vllm_native.classes.mixed_precision import ROUNDS_X
from vllm.compressed_linear.machine.platform import Platform

DELEGATED = "vllm"
"""Backend name in the plan for layers that vLLM's own quantization code runs."""

ROUNDING = CpuInt8FastBackend.name
"""The backend that rounds x as vLLM does by default on CPUs with AMX."""

CACHE_HIT, CACHE_MISS, CACHE_UNUSED = "hit", "miss", "not kept"
"""Action of the prepared-weights cache for a layer; empty without a cache."""

PROGRESS_FROM_BYTES = 1 << 30
"""Checkpoint bytes of one process from which preparation shows a progress bar."""


@dataclass(frozen=True)
class Rejection:
    """A backend that was not chosen: with reasons if it cannot, without if it ranks lower."""

    backend: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanEntry:
    """One layer, or one run of equal shards of a layer whose shards differ. ``variant``: the code
    path, of each range of M if they differ; ``prepared_variant``: what prepared tensors and
    compiled graphs depend on of it. ``batch_invariant``: whether the bits of a row depend on no
    other. ``chosen_by``: see ``registry.ChosenBy``; empty for a layer that is left to vLLM."""

    name: str
    kind: str
    backend: str
    variant: str
    descriptor: str
    bytes_checkpoint: int
    bytes_prepared: int
    prepare_seconds: float
    prepared_variant: str = ""
    batch_invariant: bool = False
    chosen_by: str = ""
    note: str = ""
    cache: str = ""
    rejected: tuple[Rejection, ...] = ()

    @property
    def runs(self) -> str:
        """Backend and code path."""
        return f"{self.backend} ({self.variant})" if self.variant else self.backend


def rejections(selection: Selection) -> tuple[Rejection, ...]:
    """The record of all other backends, for a plan entry."""
    able = [Rejection(c.name) for c in selection.also_able]
    return (*able, *(Rejection(c.name, c.verdict.reasons) for c in selection.rejected))


def rounding_note(choices: Iterable[tuple[str, Sequence[Rejection]]]) -> str:
    """A line on the parts of which vLLM alone would round x to 8 bits, or empty if there are none.
    ``choices``: of each part the backend and the rejections."""
    count = sum(
        backend != ROUNDING
        and any(
            rejection.reasons and all(reason.startswith(ROUNDS_X) for reason in rejection.reasons)
            for rejection in rejected
        )
        for backend, rejected in choices
    )
    if not count:
        return ""
    return (
        f"vLLM alone would round activations of {count} layer{'s' * (count > 1)} to 8 bits, "
        "unasked (VLLM_CPU_INT4_W4A8); this package does so only with "
        f"VLLM_COMPRESSED_LINEAR_BACKEND={ROUNDING}"
    )


@dataclass
class Plan:
    """The layers of one model, in the order in which they were prepared, and plans of its drafters.

    ``model``: name of a drafter; empty in the plan of a target, which writes the file and has the
    fingerprint for all of them. ``platform``: for which they were chosen. ``owner``: the
    model itself. ``expected``: number of the layers that are prepared or about to be.
    """

    model: str = ""
    target: Plan | None = None
    drafters: dict[str, Plan] = field(default_factory=dict)
    entries: dict[tuple[str, int], PlanEntry] = field(default_factory=dict)
    expected: int = 0
    prepared: int = 0
    plan_file: str = ""
    rank: int = 0
    platform: Platform | None = None
    owner: ref[Any] | None = None
    is_open: bool = False
    """Whether a model is being loaded, so that entries may come that were not reported yet."""
    _progress: Any = None

    def drafter(self, model: str) -> Plan:
        """The plan of this model's drafter ``model``."""
        return self.drafters.setdefault(model, Plan(model, self))

    def loading(self) -> list[Plan]:
        """This plan and those of drafters, as far as a model of them is being loaded."""
        return [plan for plan in (self, *self.drafters.values()) if plan.is_open]

    def open(self, plan_file: str) -> None:
        """A model is being built. ``plan_file``: where to write the plan; empty for nowhere."""
        self.is_open, self.plan_file = True, plan_file

    def begin(self, layers: int, nbytes: int) -> None:
        """``layers`` layers of ``nbytes`` in the checkpoint are about to be prepared. Opens the
        progress bar of a large model."""
        self.expected += layers
        if nbytes >= PROGRESS_FROM_BYTES:
            self._progress = tqdm(total=layers, desc="Preparing weights", unit="layer")

    def layer_finished(self) -> None:
        """Called after a layer is prepared."""
        self.prepared += 1
        if self._progress is not None:
            self._progress.update()

    def end(self) -> None:
        """No more layers come from this model, all prepared or not. Closes the progress bar."""
        self.is_open = False
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def add(self, entry: PlanEntry, part: int = 0) -> None:
        """Record what runs (part ``part`` of) a layer; a reload replaces the entry."""
        self.entries[(entry.name, part)] = entry

    def remove(self, name: str) -> None:
        """The prepared layer ``name`` is gone. If its model, a drafter, is still there, vLLM uses
        the target's layer in its place."""
        target = self.target
        if target is None or target.drafters.get(self.model) is not self:
            return
        if self.owner is not None and self.owner() is not None:
            for key in [key for key in self.entries if key[0] == name]:
                del self.entries[key]
            self.write()

    def fingerprint(self) -> str:
        """Hash of what compiled graphs depend on: name, backend, prepared variant and descriptor of
        every entry, drafters' included."""
        return hashlib.sha256(json.dumps(self._identity()).encode()).hexdigest()[:16]

    def _identity(self) -> list[Any]:
        own = [(e.name, e.backend, e.prepared_variant, e.descriptor) for e in self.entries.values()]
        return own + [(plan.model, plan._identity()) for plan in self.drafters.values()]

    def summary(self) -> str:
        """One line: how many layers each backend runs."""
        counts = Counter(entry.runs for entry in self.entries.values())
        before = sum(e.bytes_checkpoint for e in self.entries.values())
        after = sum(e.bytes_prepared for e in self.entries.values())
        seconds = sum(e.prepare_seconds for e in self.entries.values())
        parts = ", ".join(f"{n} on {name}" for name, n in counts.most_common())
        cached = Counter(entry.cache for entry in self.entries.values())
        found = f", {cached[CACHE_HIT]} from the cache" if cached.keys() - {""} else ""
        whose = f"drafter {self.model}: " if self.model else ""
        return (
            f"{whose}{len(self.entries)} layers: {parts}; {before / 2**20:.1f} MiB of weights "
            f"became {after / 2**20:.1f} MiB in {seconds:.2f} s{found}"
        )

    def slow_layers(self) -> list[PlanEntry]:
        """Layers on the reference backend that were not requested by the user."""
        return [
            entry
            for entry in self.entries.values()
            if entry.backend == REFERENCE and entry.chosen_by != "asked for"
        ]

    def choices(self) -> dict[str, list[str]]:
        """Layer → backends of its parts, to be compared among ranks."""
        out: dict[str, list[str]] = {}
        for entry in self.entries.values():
            out.setdefault(entry.name, []).append(entry.runs)
        return out

    def to_json(self) -> dict[str, Any]:
        """Serialize everything, for ``VLLM_COMPRESSED_LINEAR_PLAN_FILE``."""
        return {
            "pid": os.getpid(),
            "rank": self.rank,
            "machine": _machine(self.platform),
            "fingerprint": self.fingerprint(),
            "layers": [asdict(entry) for entry in self.entries.values()],
            "drafters": [
                {"model": name, "layers": [asdict(entry) for entry in plan.entries.values()]}
                for name, plan in self.drafters.items()
            ],
        }

    def write(self) -> None:
        """Write the plan file, if requested; ranks above 0 append their number to the name.

        Raises ``OSError``, and leaves nothing half written.
        """
        if self.target is not None:
            self.target.plan_file = self.plan_file or self.target.plan_file
            self.target.rank = self.rank
            self.target.write()
            return
        if not self.plan_file:
            return
        path = Path(self.plan_file)
        if self.rank:
            path = path.with_name(f"{path.stem}.rank{self.rank}{path.suffix}")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.to_json(), indent=1))
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def reset(self) -> None:
        """Clear everything, before another model is loaded into this process."""
        self.__init__()  # type: ignore[misc]


def _machine(platform: Platform | None) -> dict[str, Any]:
    """Names of the processor and of the platform, the threads of one rank, and of a CPU the rates
    by which instruction sets are chosen."""
    if platform is None:
        return {}
    found: dict[str, Any] = {
        "processor": platform.gpu or platform.cpu,
        "platform": platform.name,
        "threads": platform.threads,
    }
    return found if platform.device != "cpu" else found | {"profile": platform.rates.to_json()}


def disagreements(choices: Sequence[Mapping[str, list[str]]]) -> list[str]:
    """One line for each layer that ranks run on different backends; ``choices`` of each rank."""
    first = choices[0]
    return [
        f"{name}: rank 0 runs {first.get(name)}, rank {rank} {other.get(name)}"
        for rank, other in enumerate(choices)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
