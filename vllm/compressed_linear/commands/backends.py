# SPDX-License-Identifier: Apache-2.0
"""Table of the declared capabilities of all backends.

Rules across several axes, and shapes, are not declared; ``explain`` shows them for real layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm.compressed_linear.backends.base import Capabilities
from vllm.compressed_linear.backends.registry import backends
from vllm.compressed_linear.commands.text import UNTESTED
from vllm.compressed_linear.machine.platform import Platform


def declared(platform: Platform) -> list[dict[str, Any]]:
    """One dictionary of plain values for each registered backend, in the order of their names.
    ``reasons``: why it cannot run on ``platform``; ``hardware_tested``: whether it has run on
    such hardware."""
    rows = []
    for name, registration in sorted(backends().items()):
        capabilities = registration.backend.capabilities
        rows.append(
            {
                "name": name,
                "class": f"{registration.backend.__module__}.{registration.backend.__qualname__}",
                "priority": registration.priority,
                "batch_invariant": registration.backend.batch_invariant,
                "platform": platform.name,
                "hardware_tested": registration.backend.hardware_tested(platform),
                "reasons": list(capabilities.platform_reasons(platform)),
                "devices": sorted(capabilities.devices),
                "weights": _weights(capabilities),
                "scales": sorted(capabilities.granularities),
                "scale_dtypes": sorted(capabilities.scale_dtypes),
                "zero_points": sorted(capabilities.zero_kinds),
                "input_dtypes": sorted(capabilities.input_dtypes),
                "further": _further(capabilities),
            }
        )
    return rows


def _weights(capabilities: Capabilities) -> list[str]:
    bits = sorted(capabilities.integer_bits)
    out = [f"integers of {_ranges(bits)} bits"] if bits else []
    out += sorted(capabilities.other_elements)
    return out + (["codebooks"] if capabilities.codebooks else [])


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _further(capabilities: Capabilities) -> list[str]:
    named = {
        "reordered channels": capabilities.channel_order,
        "padded groups": capabilities.padded_order,
        "second-level scales": capabilities.row_scale,
        "quantized activations": capabilities.activations,
        "scaled activations": capabilities.prescale,
        "transforms": capabilities.transforms,
        "rows of embedding tables": capabilities.lookup,
    }
    return [name for name, present in named.items() if present]


def print_declared(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Format the table: one block of lines for each backend."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        reasons = "; ".join(row["reasons"])
        here = Text(f"not on {row['platform']}: {reasons}", style="red")
        if not reasons:
            here = Text(f"runs on {row['platform']}", style="green")
            if not row["hardware_tested"]:
                here.append(f", {UNTESTED}", style="yellow")
        table.add_row(Text(row["name"], style="bold"), here)
        for title, key in (
            ("weights", "weights"),
            ("scales per", "scales"),
            ("scale dtypes", "scale_dtypes"),
            ("zero points", "zero_points"),
            ("activations", "input_dtypes"),
            ("devices", "devices"),
            ("also", "further"),
        ):
            table.add_row(f"  {title}", ", ".join(row[key]) or "none")
        table.add_row()
    console.print(table)
