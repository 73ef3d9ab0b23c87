# SPDX-License-Identifier: Apache-2.0
"""A record of ``benchmarks.linear`` as tables, and the figures that are read off it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

Report = dict[str, Any]


def ours_of(report: Report) -> list[dict[str, Any]]:
    """Results of our own backends, the preferred one first."""
    return [result for result in report["results"] if result["id"].startswith("ours/")]


def row(result: dict[str, Any], m: int) -> dict[str, Any] | None:
    """What was measured for M = ``m``, None if that was not."""
    return next((found for found in result["rows"] if found["m"] == m), None)


def decode_limit(report: Report, result: dict[str, Any]) -> float:
    """GB/s that one token could reach: reading memory, or decoding what lies in the cache."""
    limits = report["limits"]
    cached = limits["cached_gb_per_s"].get(result["id"].removeprefix("ours/"))
    return min(limits["read_gb_per_s"], cached or float("inf"))


def share_of_limit(report: Report, result: dict[str, Any], m: int) -> float | None:
    """How much of what the machine allows one of our results reached: of reading or decoding for
    M = 1, of multiplying for M ≥ 64 (int8 products for quantized activations)."""
    found = row(result, m)
    if found is None:
        return None
    if m == 1:
        return found["weight_gb_per_s"] / decode_limit(report, result)
    if m >= 64:
        rate = "int8_gemm_gop_per_s" if report["integer"] else "bf16_gemm_gflop_per_s"
        best = report["limits"][rate]
        return found["gflop_per_s"] / best
    return None


def tables(report: Report) -> Iterator[RenderableType]:
    """The record for people."""
    about, limits = report["machine"], report["limits"]
    rows = [found["m"] for found in report["results"][0]["rows"]]
    table = Table(
        title=f"{report['title']}: N={report['n']} K={report['k']}, {report['threads']} thread(s) "
        f"of {about['cpu']} ({about['isa']})",
        caption=f"ms per call, median of {report['clock']} time; ± half the distance of the "
        "quartiles; × faster than vLLM; % of what the machine allows",
        title_justify="left",
    )
    table.add_column("kernel")
    table.add_column("MB", justify="right")
    for m in rows:
        table.add_column(f"M={m}", justify="right")
    base = next((r for r in report["results"] if r["id"] == "vllm"), None)
    for result in report["results"]:
        cells = [_cell(report, result, base, m) for m in rows]
        table.add_row(result["name"], f"{result['weight_bytes'] / 1e6:.1f}", *cells)
    yield table
    cached = ", ".join(f"{k} {v:.1f} GB/s" for k, v in limits["cached_gb_per_s"].items())
    yield Text(
        f"read {limits['read_gb_per_s']:.1f} GB/s; decode from cache: {cached or 'nothing'}; "
        f"bf16 GEMM {limits['bf16_gemm_gflop_per_s']:.0f} GFLOP/s, "
        f"int8 {limits['int8_gemm_gop_per_s']:.0f} GOP/s; load {about['load_average_before']:.1f}"
    )
    for kind, reasons in (("declined by", report["declined"]), ("not in", report["refused"])):
        for name, reason in reasons.items():
            yield Text(f"{kind} {name}: {reason[:300]}")
    yield Text()


def _cell(report: Report, result: dict[str, Any], base: dict[str, Any] | None, m: int) -> Text:
    found = row(result, m)
    assert found is not None
    text = Text(f"{found['median_ms']:.3f} ±{found['spread'] * 50:.0f}%")
    stock = None if base is None else row(base, m)
    if stock is not None and base is not result:
        text.append(f" ×{stock['median_ms'] / found['median_ms']:.2f}", "green")
    if result["id"].startswith("ours/"):
        share = share_of_limit(report, result, m)
        if share is not None:
            text.append(f" {share:.0%}", "cyan")
    return text
