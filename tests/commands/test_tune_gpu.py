# SPDX-License-Identifier: Apache-2.0
"""``tune`` on GPUs: the same, but for the clock and for calls that are replayed from a graph."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.support.checkpoints import checkpoint
from tests.support.timed_toys import MODEL, Fast, Toy
from vllm.compressed_linear.backends.measurements import MachineKey, Measured
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.commands.tune import tune as tuning
from vllm.compressed_linear.commands.tune.text import print_result
from vllm.compressed_linear.commands.tune.tune import Measuring
from vllm.compressed_linear.machine import timing
from vllm.compressed_linear.machine.cost import GPU_MIX, expected_seconds
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor

pytestmark = pytest.mark.usefixtures("only_toys")


class Graph:
    """Makes the calls that a CUDA graph would replay."""

    def __init__(self, call: Any, calls: int) -> None:
        self.call, self.calls = call, calls

    def replay(self) -> None:
        for number in range(self.calls):
            self.call(number)


def test_calls_on_a_gpu_are_replayed_from_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "captured", Graph)

    def empty(method: Any, weights: Any) -> dict[str, torch.Tensor]:
        return {"codes": torch.empty(method.descriptor.n, method.descriptor.k, device="meta")}

    def nothing(method: Any, tensors: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        assert x.device == tensors["codes"].device
        return x.new_empty(x.shape[0], method.descriptor.n)

    monkeypatch.setattr(ReferenceBackend, "prep_weights_for_execution", empty)
    monkeypatch.setattr(ReferenceBackend, "apply", nothing)
    platform = Platform.parse("cuda:90")
    # Tensors without memory stand for those on a GPU.
    measuring = Measuring(0.0, 1 << 16, lambda: Toy.now, matrix=16, device="meta")
    (layer, *_) = tuned_layers(platform)
    measured = tuning.measure_descriptor(layer, tuning.candidates(layer, platform), measuring)
    assert set(measured) == {"fast", "slow"}
    for m in GPU_MIX:
        seconds = measured["fast"].seconds[m]
        assert seconds == pytest.approx(m * layer.n * Fast.per_row, rel=1e-3)
    assert set(Toy.sizes) == {layer.n}
    found = Measured("", measured["fast"].seconds, {})
    platform = replace(platform, gpu="a GPU")
    key = MachineKey.of(platform)
    assert key is not None
    shown = tuning.TuneResult(key, layers=[_shown(layer, measured, platform)])
    console = Console(width=120)
    with console.capture() as captured:
        print_result(shown, console)
    assert "a GPU, 132 multiprocessors\n" in captured.get()
    assert "M=2048" in captured.get()
    assert "M=512" not in captured.get()
    assert found.expected == pytest.approx(expected_seconds(found.seconds.__getitem__, GPU_MIX))


def _shown(
    layer: CompressedLinearDescriptor, measured: dict[str, Measured], platform: Platform
) -> tuning.LayerResult:
    able = tuple(tuning.candidates(layer, platform))
    return tuning.LayerResult(layer, ("a layer",), measured, able, "fast")


def tuned_layers(platform: Platform) -> list[CompressedLinearDescriptor]:
    found = explain(str(checkpoint(MODEL)), platform=platform)
    return list(tuning.descriptors(found.layers))


def test_a_gpu_has_a_key_and_a_clock_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(Platform.parse("cuda:90"), gpu="NVIDIA H100", multiprocessors=132)
    key = MachineKey.of(gpu)
    assert key is not None
    assert (key.cpu, key.threads, key.isa) == ("NVIDIA H100, 132 multiprocessors", 0, "")
    assert MachineKey.of(Platform.parse("cuda:90")) is None
    waited: list[bool] = []
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    measuring = Measuring.of(gpu, 1.0)
    assert (measuring.device, measuring.cache_bytes) == ("cuda", 50 << 20)
    assert measuring.now() <= measuring.now()
    assert len(waited) == 2
    assert measuring.repeats(1) > measuring.repeats(2048) > 1
