# SPDX-License-Identifier: Apache-2.0
"""What is read off results: shares of limits, tables, plots."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import contest, linear, markdown, plots, table

MACHINE = {
    "isa": "avx2",
    "cpu": "C",
    "family": "zen3",
    "torch": "2",
    "vllm": "0",
    "revision": "abc",
    "date": "today",
    "load_average_before": 0.4,
    "load_average_after": 2.2,
}


PRODUCTS = [
    {"name": "FMA", "arithmetic": "fp32", "gop_per_s": 100.0},
    {"name": "dots", "arithmetic": "bf16", "gop_per_s": 90.0},
    {"name": "bytes", "arithmetic": "int8", "gop_per_s": 400.0},
]


def record(ms: dict[str, float], **further: Any) -> table.Report:
    """A record with one row, M=1, of 10 MB of weights."""
    results = [
        {
            "id": key,
            "name": key.replace("/", ", "),
            "contract": contest.X_AS_IT_IS,
            "weight_bytes": 10_000_000,
            "may_be_cached": False,
            "rows": [
                {
                    "m": 1,
                    "median_ms": t,
                    "spread": 0.1,
                    "weight_gb_per_s": 10 / t,
                    "gflop_per_s": 1,
                    "kernel": "planes/avx2",
                    "fixed_ms": 0.02,
                    "op_gb_per_s": contest.without_fixed(t, 0.02, 10_000_000, 10_000),
                }
            ],
        }
        for key, t in ms.items()
    ]
    limits = {"read_gb_per_s": 40.0, "read_median_gb_per_s": 39.0, "products": PRODUCTS}
    return {
        "scheme": "w4",
        "order": 3,
        "machine": MACHINE,
        "threads": 1,
        "clock": "CPU",
        "forced_isa": None,
        "title": "4-bit",
        "integer": False,
        "n": 16,
        "k": 16,
        "limits": limits | {"cached_gb_per_s": {"cpu": 25.0}},
        "declined": {},
        "refused": {},
        "results": results,
    } | further


def write(directory: Path, name: str, report: table.Report) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(report))


def test_one_token_is_held_against_the_slower_of_reading_and_decoding() -> None:
    report = record({"ours/cpu": 0.5})
    (result,) = report["results"]
    assert table.share_of_limit(report, result, 1) == pytest.approx(20 / 25)
    assert table.read_share(report, result) == pytest.approx(20 / 40)


@pytest.mark.parametrize(("integer", "limit"), [(False, 100.0), (True, 400.0)])
def test_many_rows_are_held_against_the_best_product_of_their_arithmetic(
    integer: bool, limit: float
) -> None:
    report = record({"ours/cpu": 0.5}, integer=integer)
    (result,) = report["results"]
    result["rows"].append({"m": 64, "median_ms": 1.0, "gflop_per_s": 50.0})
    assert table.share_of_limit(report, result, 64) == pytest.approx(50 / limit)


def test_the_fixed_cost_of_a_call_is_left_out_of_the_rate() -> None:
    # 10 MB, of which 16 channels have 0.01, in 0.52 ms, of which 0.02 are the call's.
    rate = contest.without_fixed(0.52, 0.02, 10_000_000, 10_000)
    assert rate == pytest.approx(9.99e6 / 0.5e-3 / 1e9)
    assert contest.without_fixed(0.02, 0.03, 10_000, 10_000) is None


def test_a_result_names_the_kernels_that_ran_and_another_contract() -> None:
    (result,) = record({"ours/cpu": 1.0})["results"]
    assert table.name_of(result) == "ours, cpu (avx2)"
    ran = ("planes/avx512", "planes/avx512", "planes/amx")
    rows = [{"m": m, "kernel": k} for m, k in zip((1, 4, 64), ran, strict=True)]
    changed = result | {"rows": rows, "contract": contest.X_ROUNDED}
    assert table.name_of(changed) == f"ours, cpu (avx512, from M=64 amx); {contest.X_ROUNDED}"


def test_what_a_load_would_choose_comes_first() -> None:
    report = record({"ours/cpu": 1.0, "ours/vllm_native": 2.0}, chosen="ours/vllm_native")
    assert [result["id"] for result in table.ours_of(report)] == ["ours/vllm_native", "ours/cpu"]
    assert table.ours_of(record({"vllm": 1.0})) == []


def test_a_record_is_a_table_for_people() -> None:
    report = record({"ours/cpu": 0.5, "vllm": 2.0})
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(*table.tables(report))
    text = console.export_text()
    assert "0.500 ±5% ×4.00 80%" in text
    assert "load average 0.4 to 2.2" in text


def test_one_token_has_the_cost_of_the_call_and_both_limits(tmp_path: Path) -> None:
    write(tmp_path, "w4", record({"ours/cpu": 0.52}))
    lines = markdown.one_token(tmp_path).splitlines()
    assert lines[2] == "| 4-bit, cpu | avx2 | 0.52 | 20 | 19.2 | 20.0 | 25.0 | 48% | 77% |"


def test_each_number_of_threads_has_a_table_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "w4", record({"ours/cpu": 0.5, "vllm": 2.0}))
    write(tmp_path, "w4-2-threads", record({"ours/cpu": 0.25}, threads=2))
    text = markdown.kinds(tmp_path)
    assert "| 4-bit | avx2 | 10.0 | 0.50 (×4.0) |" in text
    assert "| 4-bit | avx2 | 10.0 | 0.25 |" in text
    assert "1 thread of C" in text
    assert "2 threads of C" in text


def test_weights_that_may_lie_in_the_cache_are_marked(tmp_path: Path) -> None:
    report = record({"ours/cpu": 0.5})
    report["results"][0]["may_be_cached"] = True
    write(tmp_path, "w4", report)
    text = markdown.kinds(tmp_path)
    assert "| 10.0* |" in text
    assert "may lie in the cache" in " ".join(text.split())


def test_older_paths_stand_beside_the_best(tmp_path: Path) -> None:
    write(tmp_path, "w4-avx2", record({"ours/cpu": 0.8}, forced_isa="avx2"))
    write(tmp_path, "w4", record({"ours/cpu": 0.5}))
    lines = markdown.older(tmp_path).splitlines()
    assert lines[2] == "| 4-bit | avx2 | 0.80 | 12.5 | 25.0 | 50% | 1.60 |"


def test_older_kernels_stand_beside_those_of_now(tmp_path: Path) -> None:
    write(tmp_path / "before", "w4", record({"ours/cpu": 4.0, "vllm": 2.0}))
    forced = record({"ours/cpu": 3.0, "ours/other": 9.0}, forced_isa="avx2")
    write(tmp_path / "before", "w4-avx2", forced)
    write(tmp_path / "now", "w4", record({"ours/cpu": 1.0, "vllm": 2.0}))
    lines = markdown.gains(tmp_path / "before", tmp_path / "now").splitlines()
    assert lines[2:6] == [
        "| 4-bit | ours, cpu (avx2) | 4.00 (×0.5) |",
        "| 4-bit | ours, cpu (avx2), avx2 forced | 3.00 |",
        "| 4-bit | now: ours, cpu (avx2) | 1.00 (×2.0) |",
        "",
    ]


def test_slower_layers_are_marked(tmp_path: Path) -> None:
    cells = [
        {"m": 1, "ratio": 0.5, "slower": False, "decided": True, "kernel": "planes/avx2"},
        {"m": 4, "ratio": 1.04, "slower": True, "decided": False, "kernel": ""},
    ]
    layer = {
        "title": "4-bit",
        "n": 8,
        "k": 4,
        "ours": "ours, cpu",
        "stock": "vLLM, Kernel",
        "contract": contest.X_AS_IT_IS,
        "may_be_cached": False,
        "cells": cells,
    }
    report = {"m": [1, 4], "threads": 1, "slower_from": 1.03, "layers": [layer], "machine": MACHINE}
    write(tmp_path, "never-slower", report)
    lines = markdown.never_slower(tmp_path / "never-slower.json").splitlines()
    ours = "cpu (planes/avx2, no kernel of ours)"
    assert lines[2] == f"| 4-bit | 8×4 | {ours} | Kernel | 0.50 | **1.04?** |"
    assert "longer: 1 of 2" in " ".join(lines)


def test_limits_are_listed_for_each_number_of_threads(tmp_path: Path) -> None:
    for threads, rate in ((1, 20.0), (2, 30.0)):
        report = record({"ours/cpu": 0.5}, threads=threads)
        report["limits"] = report["limits"] | {"read_gb_per_s_by_streams": {"1": rate}}
        write(tmp_path, f"w4-{threads}", report)
    lines = markdown.limits(tmp_path).splitlines()
    assert lines[0] == "| limit | 1 thread | 2 threads |"
    assert lines[2] == "| reading, 1 stream a thread (GB/s) | 20.0 | 30.0 |"
    assert "| fp32, FMA (10⁹ operations/s) | 100 | 100 |" in lines


def test_families_without_records_are_not_measured(tmp_path: Path) -> None:
    write(tmp_path / "zen3" / "linear", "w4", record({"ours/cpu": 0.5}))
    lines = markdown.families(tmp_path).splitlines()
    assert lines[0] == "* **AMD Zen 3**: measured, C, today"
    assert "* AMD Zen 5: not measured" in lines


@pytest.mark.parametrize(
    ("isa", "threads", "name"),
    [(None, 1, "w4.json"), ("amx", 1, "w4-amx.json"), (None, 8, "w4-8-threads.json")],
)
def test_records_of_unlike_runs_have_unlike_names(isa: str, threads: int, name: str) -> None:
    assert linear.file_of("w4", isa, threads) == name


def test_plots_are_written(tmp_path: Path) -> None:
    write(tmp_path / "linear", "w4", record({"ours/cpu": 0.5, "vllm": 2.0}))
    written = plots.draw(tmp_path, tmp_path / "images")
    assert [path.name for path in written] == ["linear-one-token.svg", "linear-w4.svg"]
    assert all("<svg" in path.read_text() for path in written)


def test_every_line_of_a_plot_can_be_told_from_the_others() -> None:
    ours = ("ours/cpu", "ours/cpu_int8", "ours/cpu_int8_fast")
    others = ("vllm", "vllm-default", "zentorch", "zentorch-a16", "aten/0", "aten/1")
    names = (*ours, *others)
    lines = plots.over_rows(record(dict.fromkeys(names, 1.0))).axes[0].lines
    assert len(lines) == len(names) + 1
    assert len({line.get_color() for line in lines}) == len(lines)
    assert len({line.get_marker() for line in lines}) == len(lines)
    styles = (*plots.OURS, *plots.OTHERS, plots.LIMIT)
    assert len({style.linestyle for style in styles}) == len(styles) >= len(lines)


def test_plots_of_the_same_results_are_the_same_files(tmp_path: Path) -> None:
    write(tmp_path / "linear", "w4", record({"ours/cpu": 0.5}))
    once, again = (plots.draw(tmp_path, tmp_path / name) for name in ("once", "again"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
