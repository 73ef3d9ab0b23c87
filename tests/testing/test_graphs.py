# SPDX-License-Identifier: Apache-2.0
"""The kit's check of CUDA graphs, with graphs that call again what they captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.machine import timing
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.testing import Case
from vllm.compressed_linear.testing.graphs import check_cuda_graph
from vllm.compressed_linear.testing.run import Run

CASE = Case(uint(4, 8), n=24, k=64, group=32)
MEMORY: dict[int, torch.Tensor] = {}


class Graph:
    """What ``timing.captured`` gives, but replayed by Python."""

    def __init__(self, call: Callable[[int], object], calls: int) -> None:
        self.call = call
        call(0)

    def replay(self) -> None:
        self.call(0)


class RemembersItsFirstResult(ReferenceBackend):
    """As one does that looks at x on the host and captures what it found."""

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return MEMORY.setdefault(len(x), super().apply(tensors, x, bias))


class LeavesItsSumsBehind(ReferenceBackend):
    """As one does whose partial sums are not cleared after a call."""

    def apply(
        self,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = super().apply(tensors, x, bias)
        MEMORY[len(x)] = MEMORY.get(len(x), torch.zeros_like(out)) + out
        return MEMORY[len(x)].clone()


def failures(backend: type[QuantLinearMethod], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(timing, "captured", Graph)
    MEMORY.clear()
    run = Run(backend, CASE.build())
    tensors = run.prepare()
    assert tensors is not None
    check_cuda_graph(run, tensors)
    return [f"{f.check}: {f.message}" for f in run.failures]


def test_a_backend_that_computes_anew_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(ReferenceBackend, monkeypatch) == []


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (RemembersItsFirstResult, "results are too far off"),
        (LeavesItsSumsBehind, "replayed twice, gave two answers"),
    ],
)
def test_one_that_cannot_be_replayed_fails(
    backend: type[QuantLinearMethod], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = failures(backend, monkeypatch)
    assert {text.split(":")[0] for text in found} == {f"CUDA graph, M={m}" for m in (1, 17, 64)}
    assert any(message in text for text in found)


def test_a_backend_that_cannot_be_captured_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: Callable[[int], object], calls: int) -> Graph:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "captured", refuse)
    run = Run(ReferenceBackend, CASE.build())
    tensors = run.prepare()
    assert tensors is not None
    check_cuda_graph(run, tensors)
    [failure] = run.failures
    assert failure.check == "CUDA graph, M=1"
    assert "not permitted when stream is capturing" in failure.message
