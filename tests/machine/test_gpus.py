# SPDX-License-Identifier: Apache-2.0
"""GPUs as values: what is published of them, what a driver would add, and estimates from both."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.support.messages import saying
from vllm.compressed_linear.backends import registry
from vllm.compressed_linear.backends.vllm_native import VllmNativeBackend
from vllm.compressed_linear.machine.cost import (
    GPU_MIX,
    MIX,
    expected_seconds,
    mix,
    mix_of,
    roofline,
)
from vllm.compressed_linear.machine.gpus import GPUS, LAUNCH_SECONDS, gpu_facts, gpu_limits
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import BF16, E4M3, ElementType, uint

H100 = Platform.parse("cuda:90")


def layer(element: ElementType) -> CompressedLinearDescriptor:
    scale = None if element.kind == "dense" else ScaleSpec("bfloat16", "group", 128)
    weight = WeightSpec(element, scale)
    return CompressedLinearDescriptor(8192, 8192, weight, "bfloat16", "bfloat16")


@pytest.mark.parametrize("capability", GPUS)
def test_facts_are_of_one_size_with_each_other(capability: int) -> None:
    facts = GPUS[capability]
    limits = facts.limits
    assert 500e9 < limits.read < 10e12
    assert limits.fp32 < limits.bf16 < limits.int8
    assert (limits.fp8 > 0) == (capability >= 89)
    assert (limits.fp4 > 0) == (capability >= 100)
    assert 50 <= facts.multiprocessors <= 200
    assert facts.shared_bytes >= 100 << 10
    assert Platform.parse(f"cuda:{capability}").limits == limits


def test_capabilities_between_and_beyond_have_those_of_a_relative() -> None:
    assert gpu_facts(87) is GPUS[86]
    assert gpu_facts(103) is GPUS[100]
    assert gpu_facts(75) is GPUS[80]
    assert gpu_facts(121) is GPUS[120]


def test_a_gpu_that_is_there_is_scaled() -> None:
    half = gpu_limits(90, multiprocessors=66, read=1e12)
    assert half.bf16 == pytest.approx(GPUS[90].limits.bf16 / 2)
    assert half.read == 1e12
    assert half.launch == LAUNCH_SECONDS


def test_detection_asks_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        major=9,
        minor=0,
        name="NVIDIA H100 PCIe",
        multi_processor_count=114,
        memory_clock_rate=1_593_000,
        memory_bus_width=5120,
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = Platform.detect("cuda")
    assert (found.name, found.gpu, found.compute_units) == ("cuda:90", "NVIDIA H100 PCIe", 114)
    assert found.limits.read == pytest.approx(2.04e12, rel=0.01)
    assert not found.assumption
    older = {k: v for k, v in vars(properties).items() if not k.startswith("memory")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**older))
    assert Platform.detect("cuda").limits.read == GPUS[90].limits.read


def test_the_mix_of_a_gpu_has_larger_batches() -> None:
    assert sum(GPU_MIX.values()) == pytest.approx(1)
    assert mix("cuda") is mix("rocm") is GPU_MIX
    assert mix("cpu") is MIX
    assert expected_seconds(float, GPU_MIX) > 5 * expected_seconds(float, MIX)
    assert mix_of(list(GPU_MIX)) is GPU_MIX
    assert mix_of(list(MIX)) is MIX
    with pytest.raises(KeyError, match="2"):
        mix_of([1, 4])


def test_a_roofline_of_a_gpu_has_a_launch_and_its_own_arithmetic() -> None:
    limits = H100.limits
    nothing = roofline(H100, read_bytes=0.0, operations=0.0, arithmetic="bf16")
    assert nothing == pytest.approx(LAUNCH_SECONDS)
    eight = roofline(H100, read_bytes=0.0, operations=limits.fp8, arithmetic="fp8")
    assert eight == pytest.approx(1 + LAUNCH_SECONDS)
    with pytest.raises(ValueError, match=saying("fp4")):
        limits.operations("fp4")
    with pytest.raises(ValueError, match=saying("'fp6'", "fp32, bf16, int8, fp8, fp4, mma")):
        limits.operations("fp6")


@pytest.mark.parametrize("capability", GPUS)
def test_warps_on_their_own_reach_all_of_the_rate_but_where_groups_of_them_multiply(
    capability: int,
) -> None:
    limits = GPUS[capability].limits
    assert (limits.operations("mma") < limits.bf16) == (capability in (90, 100))
    half = gpu_limits(capability, multiprocessors=GPUS[capability].multiprocessors // 2)
    assert half.operations("mma") == pytest.approx(limits.operations("mma") / 2, rel=0.01)


@pytest.mark.needs_vllm
@pytest.mark.parametrize("capability", GPUS)
def test_estimates_grow_with_tokens_and_shrink_with_bits(capability: int) -> None:
    platform = Platform.parse(f"cuda:{capability}")
    times = []
    for element in (uint(4, 8), uint(8, 128), BF16):
        d = layer(element)
        assert VllmNativeBackend.can_implement(d, platform)
        rows = [VllmNativeBackend.seconds(d, platform, m) for m in GPU_MIX]
        assert rows == sorted(rows)
        times.append(rows[0])
        best = registry.rank(d, platform)[0]
        assert best.name == VllmNativeBackend.name
        assert best.seconds == pytest.approx(
            sum(share * row for share, row in zip(GPU_MIX.values(), rows, strict=True))
        )
    assert times == sorted(times)


@pytest.mark.needs_vllm
def test_fp8_weights_have_a_kernel_where_there_is_no_fp8_arithmetic() -> None:
    d = layer(E4M3)
    assert VllmNativeBackend.variant(d, Platform.parse("cuda:80")).startswith("Marlin")
    smaller = replace(H100, multiprocessors=10, read=1e11)
    assert VllmNativeBackend.seconds(d, smaller, 1) > VllmNativeBackend.seconds(d, H100, 1)
