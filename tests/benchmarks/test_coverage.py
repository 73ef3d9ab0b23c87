# SPDX-License-Identifier: Apache-2.0
"""The table of targets says what the records show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import coverage, targets
from benchmarks.family_records import Records

KEYS = [target.key for target in targets.TARGETS]
TILES = {"name": "tile_bf16", "arithmetic": "bf16", "gop_per_s": 3000.0}
DOTS = {"name": "dots", "arithmetic": "bf16", "gop_per_s": 200.0}


def result(key: str, ms: dict[int, float]) -> dict[str, Any]:
    rows = [
        {"m": m, "median_ms": t, "weight_gb_per_s": 8 / t, "gflop_per_s": 2 * m * 16.8 / t}
        for m, t in ms.items()
    ]
    return {"id": key, "name": key, "rows": rows}


def report(scheme: str, *results: dict[str, Any], tiles: bool = False, **more: Any) -> Any:
    return {
        "scheme": scheme,
        "order": 0,
        "threads": 1,
        "forced_isa": None,
        "integer": False,
        "machine": {"isa": "avx512"},
        "limits": {
            "read_gb_per_s": 20.0,
            "cached_gb_per_s": {"cpu": 30.0},
            "products": [DOTS, *([TILES] if tiles else [])],
        },
        "results": list(results),
    } | more


def write(file: Path, record: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))


def cell_of(key: str, directory: Path) -> str:
    return coverage.cell(targets.TARGETS[KEYS.index(key)], Records(directory))


def test_the_table_is_that_of_the_records() -> None:
    assert coverage.FILE.read_text() == coverage.page(), "run python -m benchmarks.coverage"


@pytest.mark.parametrize("key", KEYS)
def test_nothing_is_claimed_without_records(key: str, tmp_path: Path) -> None:
    assert cell_of(key, tmp_path) in ("*not measured*", "no AMX")


def test_counts_are_of_targets_that_there_are() -> None:
    for file in coverage.RESULTS.glob("*/counts.json"):
        assert set(json.loads(file.read_text())) <= set(KEYS), file


def test_a_target_is_met_or_missed_with_its_count(tmp_path: Path) -> None:
    w4 = tmp_path / "linear" / "w4.json"
    write(w4, report("w4", result("ours/cpu", {1: 8 / 19})))
    assert cell_of("reading", tmp_path) == "**met**: 95% of 20.0 GB/s"
    write(w4, report("w4", result("ours/cpu", {1: 8 / 10})))
    write(tmp_path / "counts.json", {"reading": "Eleven instructions."})
    assert cell_of("reading", tmp_path) == "missed: 50% of 20.0 GB/s. Eleven instructions."


def test_gains_are_held_against_the_kernels_before(tmp_path: Path) -> None:
    old = report("w4", result("ours/cpu", {4: 2.0, 16: 6.0}), forced_isa="avx512")
    write(tmp_path / "before" / "w4-avx512.json", old)
    write(tmp_path / "linear" / "w4.json", report("w4", result("ours/cpu", {4: 1.0, 16: 4.0})))
    assert cell_of("some-rows", tmp_path) == "missed: M=4 ×2.00, M=16 ×1.50"


def test_targets_of_tiles_need_tiles(tmp_path: Path) -> None:
    ours, theirs = result("ours/cpu", {64: 2.0, 256: 8.0}), result("vllm", {64: 5.0, 256: 9.0})
    for tiles, expected in (
        (True, "**met**: M=64 ×2.50; M=256 1075 GFLOP/s of 3000"),
        (False, "no AMX"),
    ):
        write(tmp_path / "linear" / "w4.json", report("w4", ours, tiles=tiles))
        write(tmp_path / "linear" / "bf16.json", report("bf16", theirs, tiles=tiles))
        assert cell_of("tiles", tmp_path) == expected


def test_layers_under_another_contract_do_not_count_as_slower(tmp_path: Path) -> None:
    def layer(contract: str, ratio: float) -> dict[str, Any]:
        return {"contract": contract, "cells": [{"ratio": ratio, "slower": ratio > 1.03}]}

    layers = [layer("x as it is", 0.8), layer("x rounded to 8 bits", 1.5)]
    write(tmp_path / "never-slower.json", {"layers": layers})
    found = "**met**: 0 of 1 cells slower; the worst takes ×0.80"
    assert cell_of("never-slower", tmp_path) == found


def test_models_are_held_against_engines_that_served(tmp_path: Path) -> None:
    def engine(rate: float) -> dict[str, Any]:
        return {"prefill_tokens_per_s": rate, "decode_tokens_per_s": {"1": rate, "16": rate}}

    engines = {"ours-head8-alone": engine(30.0), "ours-alone": {"error": "no"}}
    write(tmp_path / "serve" / "gemma-3-270m.json", {"engines": engines})
    assert cell_of("llama", tmp_path) == "*not measured*"
    engines["llama"] = engine(10.0)
    write(tmp_path / "serve" / "gemma-3-270m.json", {"engines": engines})
    assert cell_of("llama", tmp_path) == "**met**: 1 stream ×3.00, 16 streams ×3.00, prefill ×3.00"
