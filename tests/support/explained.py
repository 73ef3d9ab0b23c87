# SPDX-License-Identifier: Apache-2.0
"""Plans of ``explain`` and of loaded models, in a form that can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.checkpoints import checkpoint
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.explain.explanation import Explanation, LayerPlan, Possibility
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN, detect_platform
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.plan import DELEGATED


def explained(name: str | Path, *, platform: str = "", **options: Any) -> Explanation:
    path = name if isinstance(name, Path) else checkpoint(name)
    where = Platform.parse(platform) if platform else detect_platform()
    return explain(str(path), platform=where, **options)


COMPARED = [
    "descriptor",
    "backend",
    "variant",
    "bytes_checkpoint",
    "bytes_prepared",
    "chosen_by",
    "rejected",
]


def planned_parts(layer: LayerPlan, case: Possibility) -> list[list[Any]]:
    """Everything that the plan of a loaded layer says too."""
    return [
        [layer.kind, str(p.descriptor), *(getattr(p, field) for field in COMPARED[1:])]
        for p in case.parts
    ]


def loaded_parts() -> dict[str, list[list[Any]]]:
    """The plan of this process by layer, delegated layers apart."""
    found: dict[str, list[list[Any]]] = {}
    for entry in PROCESS_PLAN.entries.values():
        if entry.backend != DELEGATED:
            values = [getattr(entry, field) for field in COMPARED]
            if entry.backend == "cpu_int8" and ", asymmetric" in entry.descriptor:
                # Only its kernels know the number of sums of codes.
                values[COMPARED.index("bytes_prepared")] = None
            found.setdefault(entry.name, []).append([entry.kind, *values])
    return found
