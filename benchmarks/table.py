# SPDX-License-Identifier: Apache-2.0
"""A record of ``benchmarks.linear`` as tables, and the figures that are read off it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.contest import X_ROUNDED

Report = dict[str, Any]


def ours_of(report: Report) -> list[dict[str, Any]]:
    """Results of our backends, the one that a load would choose first; that may be the one that
    runs vLLM's kernels. Older records have them in the order of preference."""
    found = [result for result in report["results"] if result["id"].startswith("ours/")]
    return sorted(found, key=lambda result: result["id"] != report.get("chosen", found[0]["id"]))


def row(result: dict[str, Any], m: int) -> dict[str, Any] | None:
    """What was measured for M = ``m``, None if that was not."""
    return next((found for found in result["rows"] if found["m"] == m), None)


def kernel_of(result: dict[str, Any]) -> str:
    """The instruction sets of our kernels that ran, for each range of M with another:
    ``avx512vnni, from M=64 amx``. Older records have what the backend said it would choose, in the
    result's name."""
    said, before = [], None
    for found in result["rows"]:
        kernel = found.get("kernel") or result["name"].partition("(")[2].removesuffix(")")
        name = ", ".join(part.rpartition("/")[2] for part in kernel.split(", "))
        if name != before:
            said.append(name if before is None else f"from M={found['m']} {name}")
        before = name
    return ", ".join(said)


def name_of(result: dict[str, Any]) -> str:
    """The name of a result with the kernel that ran, if it is ours, and with its contract, if that
    is not the checkpoint's."""
    name = str(result["name"])
    if result["id"].startswith("ours/") and "(" not in name:
        kernel = kernel_of(result)
        name += f" ({kernel})" if kernel else ""
    return f"{name}; {X_ROUNDED}" if result.get("contract") == X_ROUNDED else name


def read_share(report: Report, result: dict[str, Any]) -> float | None:
    """How much of the rate of reading memory one token reached; None if it was not measured."""
    found = row(result, 1)
    if found is None:
        return None
    return float(found["weight_gb_per_s"] / report["limits"]["read_gb_per_s"])


def decode_limit(report: Report, result: dict[str, Any]) -> float:
    """GB/s that one token could reach: reading memory, or decoding what lies in the cache."""
    limits = report["limits"]
    cached = limits["cached_gb_per_s"].get(result["id"].removeprefix("ours/"))
    return min(limits["read_gb_per_s"], cached or float("inf"))


def product_limit(report: Report) -> tuple[str, float]:
    """The best product of the machine for the scheme, in 10⁹ operations a second: of bytes where
    both operands are integers, else of bf16 or fp32; and its name."""
    kinds = ("int8",) if report["integer"] else ("bf16", "fp32")
    products = [p for p in report["limits"]["products"] if p["arithmetic"] in kinds]
    best = max(products, key=lambda product: product["gop_per_s"])
    return f"{best['arithmetic']}, {best['name']}", best["gop_per_s"]


def share_of_limit(report: Report, result: dict[str, Any], m: int) -> float | None:
    """How much of what the machine allows one of our results reached: of reading or decoding for
    M = 1, of multiplying for M ≥ 64 (products of bytes for quantized activations)."""
    found = row(result, m)
    if found is None:
        return None
    if m == 1:
        return float(found["weight_gb_per_s"] / decode_limit(report, result))
    if m >= 64:
        return float(found["gflop_per_s"] / product_limit(report)[1])
    return None


def tables(report: Report) -> Iterator[RenderableType]:
    """The record for people."""
    about = report["machine"]
    rows = [found["m"] for found in report["results"][0]["rows"]]
    title = (
        f"{report['title']}: N={report['n']} K={report['k']}, {report['threads']} thread(s) of "
        f"{about['cpu']}"
    )
    table = Table(
        title=title,
        caption=f"ms per call, median of {report['clock']} time; ± half the distance of the "
        "quartiles; × faster than vLLM; % of what the machine allows; * weights may lie in the "
        "cache",
        title_justify="left",
    )
    table.add_column("kernel")
    table.add_column("MB", justify="right")
    for m in rows:
        table.add_column(f"M={m}", justify="right")
    base = next((r for r in report["results"] if r["id"] == "vllm"), None)
    for result in report["results"]:
        cells = [_cell(report, result, base, m) for m in rows]
        size = f"{result['weight_bytes'] / 1e6:.1f}" + "*" * result.get("may_be_cached", False)
        table.add_row(name_of(result), size, *cells)
    yield table
    if 1 in rows and ours_of(report):
        yield _one_token(report)
    yield Text(_limits(report))
    for kind, reasons in (("declined by", report["declined"]), ("not in", report["refused"])):
        for name, reason in reasons.items():
            yield Text(f"{kind} {name}: {reason[:300]}")
    yield Text()


def _one_token(report: Report) -> Table:
    table = Table(
        title="One token, our kernels",
        caption="fixed: the same op with 16 output channels, cold; op: without it",
        title_justify="left",
    )
    for title in ("kernel", "ms", "fixed µs", "GB/s", "op GB/s", "from cache", "of reading"):
        table.add_column(title, justify="left" if title == "kernel" else "right")
    table.add_column("of min(read, decode)", justify="right")
    for result in ours_of(report):
        found = row(result, 1)
        assert found is not None
        table.add_row(name_of(result), f"{found['median_ms']:.3f}", *reading_cells(report, result))
    return table


def reading_cells(report: Report, result: dict[str, Any]) -> list[str]:
    """Of a call with one token: what it costs apart from reading (µs), GB/s with and without that
    and from the cache, shares of reading and of the least of reading and decoding."""
    found, share = row(result, 1), share_of_limit(report, result, 1)
    assert found is not None
    cached = report["limits"]["cached_gb_per_s"].get(result["id"].removeprefix("ours/"))
    fixed = found.get("fixed_ms")
    return [
        number(None if fixed is None else fixed * 1e3, 0),
        number(found["weight_gb_per_s"], 1),
        number(found.get("op_gb_per_s"), 1),
        number(cached, 1),
        f"{read_share(report, result):.0%}",
        f"{share:.0%}",
    ]


def number(value: float | None, digits: int) -> str:
    """``value`` with so many digits; empty if there is none."""
    return "" if value is None else f"{value:.{digits}f}"


def _limits(report: Report) -> str:
    limits, about = report["limits"], report["machine"]
    products = "; ".join(
        f"{p['name']} ({p['arithmetic']}) {p['gop_per_s']:.0f}" for p in limits["products"]
    )
    return (
        f"read {limits['read_gb_per_s']:.1f} GB/s (median {limits['read_median_gb_per_s']:.1f}); "
        f"10⁹ operations a second: {products}; load average {about['load_average_before']:.1f} to "
        f"{about['load_average_after']:.1f}"
    )


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
