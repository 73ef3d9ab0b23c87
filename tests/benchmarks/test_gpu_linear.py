# SPDX-License-Identifier: Apache-2.0
"""``benchmarks.gpu_linear`` as far as it runs without a GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import gpu_linear
from tests.support import cuda_doubles
from tests.support.messages import saying, says
from vllm.compressed_linear.backends.vllm_native import op
from vllm.compressed_linear.backends.vllm_native.classes import process, tables
from vllm.compressed_linear.commands.tune.random_weights import random_weights
from vllm.compressed_linear.machine.platform import Platform

H100 = Platform.parse("cuda:90")


def test_without_a_gpu_it_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=saying("NVIDIA GPU")):
        gpu_linear.main([])


def test_unknown_weights_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_linear.main(["int5"])
    assert says(capsys.readouterr().err, "int5", "int4, int8, fp8, nvfp4")


def test_every_layer_of_both_models_is_measured_with_every_kind() -> None:
    options = gpu_linear.parser().parse_args([])
    found = gpu_linear.layers(list(gpu_linear.WEIGHTS), options.model)
    assert len(found) == 4 * 2 * 4
    assert (min(options.m), max(options.m)) == (1, 4096)
    for layer in found:
        assert layer.descriptor.n == layer.n
        assert layer.descriptor.weight == gpu_linear.WEIGHTS[layer.weights]


@pytest.mark.skipif(tables.unavailable("mixed precision") is not None, reason="no kernel classes")
@pytest.mark.parametrize(
    ("weights", "kernels"),
    [
        ("int4", {"MacheteLinearKernel", "MarlinLinearKernel", "TritonW4A16LinearKernel"}),
        ("int8", {"MacheteLinearKernel", "MarlinLinearKernel"}),
        ("fp8", {"MarlinFP8ScaledMMLinearKernel"}),
        ("nvfp4", {"MarlinNvFp4LinearKernel"}),
    ],
)
def test_each_of_vllms_classes_is_a_contender(weights: str, kernels: set[str]) -> None:
    d = gpu_linear.Layer(weights, "8b", "o", 4096, 4096).descriptor
    can, cannot = gpu_linear.able(d, H100)
    assert {f"vLLM {name}" for name in kernels} <= set(can)
    assert "reference" not in can
    assert cannot["cpu"].startswith("device cuda")


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8", "nvfp4"])
def test_contenders_compute_the_layer(weights: str) -> None:
    cuda_doubles.install()
    op.ready.cache_clear()
    a100 = Platform.parse("cuda:80")
    d = gpu_linear.Layer(weights, "8b", "o", 128, 256).descriptor
    made = random_weights(d)
    exact = made.dequantize(0, d.n)
    can, _ = gpu_linear.able(d, a100)
    name, tag = next((name, tag) for name, tag in can.items() if "Marlin" in name)
    with process.pretending(a100):
        found = gpu_linear.contender(name, tag, d, made, a100, enough=1 << 20)
        assert len(found.copies) * found.weight_bytes >= 1 << 20
        assert gpu_linear.check(found, exact) < gpu_linear.TOLERANCE
        with pytest.raises(SystemExit, match="it is another layer"):
            gpu_linear.check(found, exact * 1.1)
    assert gpu_linear.check(gpu_linear.cublas(exact, 1), exact) < gpu_linear.TOLERANCE


def test_turns_alternate_and_the_first_is_dropped() -> None:
    calls: list[int] = []

    def timed(index: int) -> float:
        calls.append(index)
        return float(len(calls))

    found = gpu_linear.in_turns([lambda: timed(0), lambda: timed(1)], 5)
    assert [len(seconds) for seconds in found] == [5, 5]
    assert all(set(calls[i : i + 2]) == {0, 1} for i in range(0, 12, 2))
    assert min(found[0] + found[1]) > 2


def record() -> dict[str, Any]:
    def result(name: str, size: int, *microseconds: float) -> dict[str, Any]:
        rows = [
            {"m": m, "median_us": us, "spread": 0.01}
            for m, us in zip((1, 4096), microseconds, strict=True)
        ]
        return {"name": name, "weight_bytes": size, "error": 0.001, "rows": rows}

    layer = {"weights": "int4", "model": "8b", "name": "o", "n": 4096, "k": 4096}
    results = [
        result("vLLM MarlinLinearKernel", 8_650_752, 5.0, 300.0),
        result(gpu_linear.CUBLAS, 33_554_432, 15.0, 200.0),
    ]
    return {
        "gpu": "a GPU",
        "limits": {"copy_bytes_per_s": 2e12, "bf16_per_s": 8e14},
        "layers": [{**layer, "descriptor": "", "declined": {}, "results": results}],
    }


def test_the_table_has_times_speed_ups_and_shares() -> None:
    report = record()
    console = Console(width=200)
    with console.capture() as captured:
        console.print(*gpu_linear.tables(report))
    text = captured.get()
    # (8 650 752 + 16 384 bytes) / 2 TB/s is 4.33 µs of 5; 137 GFLOP / 800 TFLOP/s 172 µs of 300.
    assert "5.0 ×3.00 87%" in text
    assert "300.0 ×0.67 57%" in text
    assert "on a GPU" in text
    assert json.loads(json.dumps(report)) == report


def test_a_summary_is_a_median_and_the_distance_of_quartiles() -> None:
    found = gpu_linear.summary([1e-6, 2e-6, 3e-6, 4e-6, 5e-6])
    assert found["median_us"] == pytest.approx(3)
    assert found["spread"] == pytest.approx(0.5)
