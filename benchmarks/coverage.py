# SPDX-License-Identifier: Apache-2.0
"""How far each family of processors is from the project's targets: COVERAGE.md.

    python -m benchmarks.coverage                       rewrites benchmarks/results/COVERAGE.md

Figures are computed from the records. Why a target is missed is counted by people, so it is written
in ``results/FAMILY/counts.json``, by the key of the target.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.families import title_of, unmeasured
from benchmarks.family_records import Records
from benchmarks.machine import ROOT
from benchmarks.markdown import table
from benchmarks.targets import TARGETS, Target
from vllm.compressed_linear.machine.profiles import INSTRUCTIONS, PROFILES, Source

RESULTS = ROOT / "benchmarks" / "results"
FILE = RESULTS / "COVERAGE.md"
MARKS: dict[Source, str] = {
    "measured": "measured",
    "published": "*published*",
    "estimated": "*estimated*",
}


def cell(target: Target, records: Records) -> str:
    """What the table says of a target and a family."""
    if target.tiles is not None and target.tiles != records.has_tiles:
        return "no AMX" if target.tiles else "has AMX"
    found = target.figure(records)
    if found is None:
        return "*not measured*"
    if found.met:
        return f"**met**: {found.text}"
    why = records.counts.get(target.key, "")
    return f"missed: {found.text}" + (f". {why}" if why else "")


def rates() -> str:
    """Instructions a cycle of the processors that have a profile, with where each rate is from."""
    named = [profile for profile in PROFILES.values() if profile.known_as]
    rows = []
    for name in INSTRUCTIONS:
        found = [dict(profile.rates).get(name) for profile in named]
        if any(found):
            cells = ["" if r is None else f"{r.value:.3g} {MARKS[r.source]}" for r in found]
            rows.append([f"`{name}`", *cells])
    return table(["instructions a cycle", *(f"`{profile.name}`" for profile in named)], rows, 0)


def page(results: Path = RESULTS) -> str:
    """The contents of COVERAGE.md."""
    families = sorted({path.parent.name for path in results.glob("*/linear")})
    records = [Records(results / name) for name in families]
    rows = [[t.title, t.wanted, *(cell(t, of) for of in records)] for t in TARGETS]
    head = ["what", "target", *map(title_of, families)]
    others = ", ".join(family.title for family in unmeasured(families))
    return (
        "# Coverage\n\n"
        "The project's targets, and what the records of each family of processors show. One layer "
        "of 4096×4096, one thread, unless said otherwise. Written by `python -m "
        "benchmarks.coverage` from the records; see docs/performance.md for how they were "
        "measured, and under what load.\n\n"
        f"{table(head, rows, 0)}\n\n"
        f"*Not measured* at all: {others}.\n\n"
        "## Rates that kernels are chosen by\n\n"
        "Each is marked with its source: measured on such a processor, published by its vendor or "
        "by uops.info, or estimated; see vllm/compressed_linear/machine/profiles.py.\n\n"
        f"{rates()}\n"
    )


def main() -> None:
    FILE.write_text(page())
    print(FILE)


if __name__ == "__main__":
    main()
