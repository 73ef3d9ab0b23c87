# SPDX-License-Identifier: Apache-2.0
"""Peak rates of GPUs of each compute capability, as published by NVIDIA.

One product represents each architecture; an installed GPU is scaled by its number of
multiprocessors and by the bandwidth that its driver reports. Rates are those of dense matrices with
fp32 accumulation (int32 for integers), without structured sparsity. Sources:

* 80, A100 SXM 80 GB: NVIDIA A100 Tensor Core GPU datasheet (2021)
* 86, GeForce RTX 3090: NVIDIA Ampere GA102 GPU Architecture whitepaper, table 2 and appendix A
* 89, L40S: NVIDIA L40S datasheet (2023)
* 90, H100 SXM: NVIDIA H100 Tensor Core GPU Architecture whitepaper, tables 1 to 3
* 100, B200: NVIDIA Blackwell datasheet (2024), HGX B200, divided by its eight GPUs
* 120, GeForce RTX 5090: NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix
* shared memory of a multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities"
* ``mma`` of 90: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
  Microbenchmarking" (2024). That of 100 is a guess: no published figure is known, and by the width
  of the units it is at most half. All other architectures have no other instruction
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm.compressed_linear.machine.limits import MachineLimits

LAUNCH_SECONDS = 3e-6
"""Seconds from one kernel to the next in a replayed CUDA graph. An estimate."""


@dataclass(frozen=True)
class GpuFacts:
    """``product``: the source of the numbers; ``multiprocessors``: of it; ``shared_bytes``: shared
    memory of one multiprocessor."""

    product: str
    multiprocessors: int
    shared_bytes: int
    limits: MachineLimits


def _facts(
    product: str,
    multiprocessors: int,
    shared_kib: int,
    read_gb: float,
    *,
    fp32: float,
    bf16: float,
    int8: float,
    fp8: float = 0.0,
    fp4: float = 0.0,
    mma: float = 1.0,
) -> GpuFacts:
    """Rates in 10^12 operations a second, ``read_gb`` in 10^9 bytes a second."""
    rates = {"fp32": fp32, "bf16": bf16, "int8": int8, "fp8": fp8, "fp4": fp4}
    limits = MachineLimits(
        read=read_gb * 1e9,
        launch=LAUNCH_SECONDS,
        mma=mma,
        **{name: rate * 1e12 for name, rate in rates.items()},
    )
    return GpuFacts(product, multiprocessors, shared_kib << 10, limits)


GPUS: dict[int, GpuFacts] = {
    80: _facts("A100 SXM 80 GB", 108, 164, 2039, fp32=19.5, bf16=312, int8=624),
    86: _facts("GeForce RTX 3090", 82, 100, 936, fp32=35.6, bf16=71, int8=284),
    89: _facts("L40S", 142, 100, 864, fp32=91.6, bf16=362, int8=733, fp8=733),
    90: _facts("H100 SXM", 132, 228, 3350, fp32=66.9, bf16=989, int8=1979, fp8=1979, mma=0.62),
    100: _facts("B200", 148, 228, 8000, fp32=75, bf16=2250, int8=4500, fp8=4500, fp4=9000, mma=0.3),
    120: _facts(
        "GeForce RTX 5090", 170, 100, 1792, fp32=104.8, bf16=209.5, int8=838, fp8=419, fp4=1676
    ),
}
"""Facts of the GPUs of each compute capability."""


def gpu_facts(capability: int) -> GpuFacts:
    """Facts of ``capability``, or else of the newest listed one that is not newer; of the oldest
    one for older GPUs."""
    known = [c for c in GPUS if c <= capability]
    return GPUS[max(known) if known else min(GPUS)]


def gpu_limits(capability: int, multiprocessors: int = 0, read: float = 0.0) -> MachineLimits:
    """Limits of a GPU with ``multiprocessors`` that reads ``read`` bytes per second; 0 means the
    value of the product that represents its capability."""
    facts = gpu_facts(capability)
    share = multiprocessors / facts.multiprocessors if multiprocessors else 1.0
    limits = facts.limits
    return replace(
        limits,
        read=read or limits.read,
        **{name: getattr(limits, name) * share for name in ("fp32", "bf16", "int8", "fp8", "fp4")},
    )
