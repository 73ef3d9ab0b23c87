# SPDX-License-Identifier: Apache-2.0
"""``benchmarks.triton_tiles`` as far as it runs without a GPU: with a clock of the test's own."""

from __future__ import annotations

import pytest
import torch

from benchmarks import triton_tiles as benchmark
from tests.support.messages import saying
from vllm.compressed_linear.backends.triton import launch, measured
from vllm.compressed_linear.backends.triton.measured import Tiles
from vllm.compressed_linear.backends.triton.spec import KernelSpec

DECLARED = Tiles(16, 128, 64, 4, 4)


class FakeGpu:
    """Calls take what ``seconds`` says of the tiles, times the layer's; and nothing else does."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def call(self, seconds: float) -> benchmark.Timed:
        def run(number: int) -> None:
            self.time += seconds * benchmark.CALLS_IN_GRAPH

        return run


def test_without_a_gpu_it_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=saying("NVIDIA GPU")):
        benchmark.main([])


def test_every_kind_is_of_another_class_that_serving_knows() -> None:
    specs = [KernelSpec.of(benchmark.layers_of(kind)[0]) for kind in benchmark.KINDS]
    classes = {launch.class_of(spec, 1, 90) for spec in specs}
    assert {(c.operand, c.codes) for c in classes} == {
        ("16-bit", "1-4"),
        ("16-bit", "5-8"),
        ("parts", "1-4"),
        ("parts", "5-8"),
        ("32-bit", "1-4"),
    }


def test_candidates_differ_from_the_declared_tiles_in_one_thing() -> None:
    found = benchmark.candidates(DECLARED)
    assert found[0] == DECLARED
    assert len(set(found)) == len(found) == 9
    for tiles in found[1:]:
        assert sum(vars(tiles)[name] != vars(DECLARED)[name] for name in vars(DECLARED)) == 1


def test_the_fastest_over_all_layers_wins() -> None:
    gpu = FakeGpu()
    tried = [DECLARED, Tiles(16, 128, 64, 8, 4), Tiles(16, 64, 64, 4, 4)]
    # The second is best on the small layer by more than the third is on the large one.
    seconds = [(8e-6, 2e-6, 4e-6), (80e-6, 80e-6, 64e-6)]
    timed = [[gpu.call(s) for s in layer] for layer in seconds]
    found = benchmark.fastest(tried, timed, budget=0.01, now=gpu.now)
    assert found.tiles == tried[1]
    assert found.seconds == pytest.approx((2e-6, 80e-6))
    assert found.faster == pytest.approx(2.0)


def test_what_does_not_fit_is_told_and_left_out() -> None:
    def start(tiles: Tiles) -> benchmark.Timed:
        if tiles.stages == 6:
            raise RuntimeError("out of resources: shared memory\nsecond line")
        return lambda number: None

    said: list[str] = []
    tried = benchmark.candidates(DECLARED)
    found = benchmark.runnable(tried, start, said.append)
    assert set(tried) - set(found) == {Tiles(16, 128, 64, 4, 6)}
    assert [line.partition(": ")[2] for line in said] == [
        "RuntimeError: out of resources: shared memory"
    ]
    with pytest.raises(RuntimeError, match="out of resources"):
        benchmark.runnable([Tiles(16, 128, 64, 4, 6)], start, said.append)


def test_calls_are_cut_as_they_are_measured() -> None:
    spec = KernelSpec.of(benchmark.layers_of("int4")[0])
    key = launch.class_of(spec, 16, 90)
    before = launch.tiles_of(spec, 16, 90)
    tried = Tiles(16, 64, 32, 8, 2)
    with benchmark.cut_as(key, tried):
        assert launch.tiles_of(spec, 16, 90) == tried
        with benchmark.cut_as(key, DECLARED):
            assert launch.tiles_of(spec, 16, 90) == DECLARED
        assert launch.tiles_of(spec, 16, 90) == tried
    assert launch.tiles_of(spec, 16, 90) == before
    assert key not in measured.table()
