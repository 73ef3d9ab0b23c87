# SPDX-License-Identifier: Apache-2.0
"""Estimated times: what they are made of, and whom they put first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.messages import saying
from vllm.compressed_linear.backends import registry
from vllm.compressed_linear.backends.cpu import weight_only
from vllm.compressed_linear.machine import limits
from vllm.compressed_linear.machine.cost import MIX, expected_seconds, roofline
from vllm.compressed_linear.machine.limits import MachineLimits, limits_of_cores
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.machine.profiles import PROFILES
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import BF16, FP32, ElementType, uint

LIMITS = MachineLimits(read=10e9, fp32=100e9, bf16=200e9, int8=400e9)
MACHINE = Platform("cpu", measured=LIMITS)
CPUS = [f"cpu:{name}" for name in PROFILES]


def layer(element: ElementType, x: str = "bfloat16", n: int = 4096) -> CompressedLinearDescriptor:
    scale = None if element.kind == "dense" else ScaleSpec("bfloat16", "group", 128)
    return CompressedLinearDescriptor(4096, n, WeightSpec(element, scale), x, x)


INT4 = layer(uint(4, 8))


def test_the_mix_is_a_distribution_of_mostly_small_batches() -> None:
    assert sum(MIX.values()) == pytest.approx(1)
    assert sum(share for m, share in MIX.items() if m <= 16) > 0.95
    assert expected_seconds(lambda m: 2.0) == pytest.approx(2)
    # 256 tokens for each prompt, 3 streams at once: the shares of calls that are prompts.
    prompts = sum(share for m, share in MIX.items() if m > 16)
    streams = sum(m * share for m, share in MIX.items() if m <= 16) / (1 - prompts)
    assert prompts == pytest.approx(streams / (256 + streams), rel=0.5)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        ({"read_bytes": 20e9, "operations": 100e9}, 2.0),
        ({"read_bytes": 20e9, "operations": 600e9}, 3.0),
        ({"read_bytes": 20e9, "operations": 600e9, "arithmetic": "fp32"}, 6.0),
        ({"read_bytes": 20e9, "operations": 600e9, "arithmetic": "int8"}, 2.0),
        ({"read_bytes": 20e9, "operations": 600e9, "efficiency": 0.5}, 6.0),
        ({"read_bytes": 20e9, "operations": 600e9, "decode_seconds": 1.0}, 4.0),
        ({"read_bytes": 20e9, "operations": 0.0, "decode_seconds": 1.0}, 2.0),
        ({"read_bytes": 20e9, "operations": 0.0, "call_seconds": 1.0}, 3.0),
    ],
)
def test_roofline(work: dict[str, float], seconds: float) -> None:
    assert roofline(MACHINE, **{"arithmetic": "bf16", **work}) == pytest.approx(seconds)  # type: ignore[arg-type]


def test_limits_by_name_threads_and_measurement() -> None:
    for name in CPUS:
        one, four = (replace(Platform.parse(name), threads=t).limits for t in (1, 4))
        assert four.bf16 == pytest.approx(4 * one.bf16)
        assert one.read <= four.read <= 4 * one.read
    profile = PROFILES["avx512bf16"]
    core = profile.core(profile.features)
    assert limits_of_cores(core, 1000).read < limits_of_cores(core, 1).read * 20
    assert MACHINE.limits is LIMITS
    assert LIMITS.operations("int8") == 400e9
    with pytest.raises(ValueError, match=saying("'int3'", "fp32, bf16, int8")):
        LIMITS.operations("int3")


@pytest.mark.parametrize("name", CPUS)
@pytest.mark.parametrize(
    "descriptor", [INT4, layer(uint(8, 128)), layer(BF16), layer(FP32, "float32")], ids=str
)
def test_more_tokens_never_take_less_and_more_threads_never_more(
    name: str, descriptor: CompressedLinearDescriptor
) -> None:
    one, four = (replace(Platform.parse(name), threads=t) for t in (1, 4))
    for registration in registry.backends().values():
        backend = registration.backend
        if not backend.can_implement(descriptor, one):
            continue
        times = [backend.seconds(descriptor, one, m) for m in MIX]
        assert times == sorted(times), backend
        assert all(backend.seconds(descriptor, four, m) <= t for m, t in zip(MIX, times))  # noqa: B905


def test_fewer_bits_are_faster_for_one_token() -> None:
    platform = Platform.parse("cpu:avx512bf16")
    order = [uint(2, 2), uint(4, 8), uint(8, 128), BF16]
    times = [weight_only.CpuBackend.seconds(layer(element), platform, 1) for element in order]
    assert times == sorted(times)


def test_exact_activations_of_more_bits_take_longer() -> None:
    platform = Platform.parse("cpu:avx512bf16")
    times = [
        weight_only.CpuBackend.seconds(layer(uint(4, 8), x), platform, 256)
        for x in ("bfloat16", "float16", "float32")
    ]
    # In two terms of bf16, or in fp32 at half of its rate, whichever is faster.
    assert times[1] > 1.5 * times[0]
    assert times[2] > 1.5 * times[0]


def test_a_processor_is_told_from_others_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(limits, "CPUINFO", file)

    def name(text: str) -> str:
        file.write_text(text)
        limits.cpu_name.cache_clear()
        return limits.cpu_name()

    try:
        zen = "model name\t: AMD EPYC\ncpu family\t: {}\nmodel\t\t: 17\n\nmodel\t: 99\n"
        assert name(zen.format(25)) == "AMD EPYC, cpu family 25, model 17"
        assert name(zen.format(26)) != name(zen.format(25))
        assert name("CPU implementer\t: 0x41\nCPU part\t: 0xd40\n") == "0xd40"
        assert name("")
    finally:
        limits.cpu_name.cache_clear()


def test_caches_of_the_threads_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores: each has a second-level cache, two share a third-level one."""
    for core in range(4):
        shared = "0-1" if core < 2 else "2-3"
        for index, (level, size, cpus) in enumerate(
            [("1", "32K", str(core)), ("2", "1024K", str(core)), ("3", "4096K", shared)]
        ):
            directory = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            directory.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", cpus)):
                (directory / name).write_text(value + "\n")
    monkeypatch.setattr(limits, "CPUS", tmp_path)
    limits.cache_bytes.cache_clear()
    try:
        assert [limits.cache_bytes(threads) >> 20 for threads in (1, 2, 8)] == [4, 8, 8]
        monkeypatch.setattr(limits, "CPUS", tmp_path / "nothing")
        limits.cache_bytes.cache_clear()
        assert limits.cache_bytes(1) == limits.UNKNOWN_CACHE_BYTES
    finally:
        limits.cache_bytes.cache_clear()
