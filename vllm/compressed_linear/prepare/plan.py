# SPDX-License-Identifier: Apache-2.0
"""The plan: what runs each layer, who could not and why, what it cost."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from vllm.compressed_linear.backends.registry import REFERENCE, Selection

DELEGATED = "vllm"
"""Backend name in the plan for layers that vLLM's own quantization code runs."""

CACHE_HIT, CACHE_MISS, CACHE_UNUSED = "hit", "miss", "not kept"
"""What the prepared-weights cache did for a layer; empty when there is none."""

PROGRESS_FROM_BYTES = 1 << 30
"""Checkpoint bytes of one process from which preparation shows a progress bar."""


@dataclass(frozen=True)
class Rejection:
    """A backend that was not taken: with reasons when it cannot, without when it ranks lower."""

    backend: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanEntry:
    """One layer, or one run of like shards of a layer whose shards differ. ``chosen_by``: see
    ``registry.ChosenBy``; empty for a layer that is left to vLLM."""

    name: str
    kind: str
    backend: str
    variant: str
    descriptor: str
    bytes_checkpoint: int
    bytes_prepared: int
    prepare_seconds: float
    batch_invariant: bool = False
    chosen_by: str = ""
    note: str = ""
    cache: str = ""
    rejected: tuple[Rejection, ...] = ()

    @property
    def runs(self) -> str:
        """Backend and code path in one word."""
        return f"{self.backend} ({self.variant})" if self.variant else self.backend


def rejections(selection: Selection) -> tuple[Rejection, ...]:
    """The record of all other backends, for a plan entry."""
    able = [Rejection(c.name) for c in selection.also_able]
    return (*able, *(Rejection(c.name, c.verdict.reasons) for c in selection.rejected))


@dataclass
class Plan:
    """Entries in the order layers were prepared."""

    entries: dict[tuple[str, int], PlanEntry] = field(default_factory=dict)
    expected: int = 0
    prepared: int = 0
    expected_bytes: int = 0
    started: float = 0.0
    plan_file: str = ""
    rank: int = 0
    _progress: Any = None

    def expect(self, nbytes: int) -> None:
        """A layer of ``nbytes`` in the checkpoint will be prepared."""
        self.expected += 1
        self.expected_bytes += nbytes

    def withdraw(self, nbytes: int) -> None:
        """An expected layer of ``nbytes`` has no weight of its own: it is tied to another."""
        self.expected -= 1
        self.expected_bytes -= nbytes

    def add(self, entry: PlanEntry, part: int = 0) -> None:
        """Record what runs (part ``part`` of) a layer; a reload replaces the entry."""
        self.entries[(entry.name, part)] = entry

    def layer_started(self) -> None:
        """Called before a layer is prepared; opens the progress bar of a large model."""
        if not self.prepared and self._progress is None:
            self.started = time.perf_counter()
            if self.expected_bytes >= PROGRESS_FROM_BYTES:
                self._progress = tqdm(total=self.expected, desc="Preparing weights", unit="layer")

    def layer_finished(self) -> bool:
        """Called after; true when that was the last one that was expected."""
        self.prepared += 1
        if self._progress is not None:
            self._progress.update()
        done = self.prepared == self.expected
        if done and self._progress is not None:
            self._progress.close()
            self._progress = None
        return done

    def fingerprint(self) -> str:
        """Changes whenever another backend, path or descriptor runs any layer."""
        text = json.dumps(
            [(e.name, e.backend, e.variant, e.descriptor) for e in self.entries.values()]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def summary(self) -> str:
        """One line: how many layers each backend runs."""
        counts = Counter(entry.runs for entry in self.entries.values())
        before = sum(e.bytes_checkpoint for e in self.entries.values())
        after = sum(e.bytes_prepared for e in self.entries.values())
        seconds = sum(e.prepare_seconds for e in self.entries.values())
        parts = ", ".join(f"{n} on {name}" for name, n in counts.most_common())
        cached = Counter(entry.cache for entry in self.entries.values())
        found = f", {cached[CACHE_HIT]} from the cache" if cached.keys() - {""} else ""
        return (
            f"{len(self.entries)} layers: {parts}; {before / 2**20:.1f} MiB of weights became "
            f"{after / 2**20:.1f} MiB in {seconds:.2f} s{found}"
        )

    def slow_layers(self) -> list[PlanEntry]:
        """Layers that fell to the reference backend without anybody asking for it."""
        return [
            entry
            for entry in self.entries.values()
            if entry.backend == REFERENCE and entry.chosen_by != "asked for"
        ]

    def choices(self) -> dict[str, list[str]]:
        """Layer → what runs its parts, to be compared with other ranks."""
        out: dict[str, list[str]] = {}
        for entry in self.entries.values():
            out.setdefault(entry.name, []).append(entry.runs)
        return out

    def to_json(self) -> dict[str, Any]:
        """Everything, for ``VLLM_COMPRESSED_LINEAR_PLAN_FILE``."""
        return {
            "pid": os.getpid(),
            "rank": self.rank,
            "fingerprint": self.fingerprint(),
            "layers": [asdict(entry) for entry in self.entries.values()],
        }

    def write(self) -> None:
        """Write the plan file, if one was asked for; ranks above 0 append theirs to the name."""
        if not self.plan_file:
            return
        path = Path(self.plan_file)
        if self.rank:
            path = path.with_name(f"{path.stem}.rank{self.rank}{path.suffix}")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.to_json(), indent=1))
        temporary.replace(path)

    def reset(self) -> None:
        """Forget everything: another model is loaded into this process."""
        self.__init__()  # type: ignore[misc]


def disagreements(choices: Sequence[Mapping[str, list[str]]]) -> list[str]:
    """Lines that name the layers which ranks run differently; ``choices`` of each rank."""
    first = choices[0]
    return [
        f"{name}: rank 0 runs {first.get(name)}, rank {rank} {other.get(name)}"
        for rank, other in enumerate(choices)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
