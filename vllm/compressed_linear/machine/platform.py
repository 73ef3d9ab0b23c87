# SPDX-License-Identifier: Apache-2.0
"""Capabilities of a machine, as a value: probed once, by ``detect``.

Tests and ``explain --platform`` make platforms by hand, so selection can be tried for machines
that are absent.
"""

from __future__ import annotations

import platform as _host
from collections.abc import Collection
from dataclasses import dataclass

import torch

from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.gpus import gpu_facts, gpu_limits
from vllm.compressed_linear.machine.limits import (
    ACCELERATOR,
    MachineLimits,
    cpu_name,
    limits_of_cores,
)
from vllm.compressed_linear.machine.vllm_wheel import CUDA_OPS, CUDA_WHEEL


@dataclass(frozen=True)
class CpuTier:
    """An instruction set of our kernels, by its name in ``csrc/cpu/common/isa.cpp``.

    ``features``: required CPU features, as in ``Platform.features``. ``core``: declared limits of
    one core near 3 GHz, instructions per cycle times the width of a register, at the clock under
    that load; without units for bf16 its rate is that of fp32. None if no platform has its name.
    ``machine``: the processor's architecture.
    """

    name: str
    features: frozenset[str]
    core: MachineLimits | None
    machine: str = "x86_64"


_AVX512 = frozenset({"avx2", "avx512"})
_AVX512_BF16 = _AVX512 | {"avx512_bf16", "avx512_vnni"}

CPU_TIERS = (
    CpuTier("generic", frozenset(), MachineLimits(15e9, 20e9, 20e9, 20e9)),
    CpuTier("avx2", frozenset({"avx2"}), MachineLimits(25e9, 90e9, 90e9, 150e9)),
    CpuTier("avx512", _AVX512, MachineLimits(30e9, 115e9, 115e9, 230e9)),
    CpuTier("avx512vnni", _AVX512 | {"avx512_vnni"}, None),
    CpuTier("avx512bf16", _AVX512_BF16, MachineLimits(30e9, 115e9, 230e9, 460e9)),
    CpuTier("amx", _AVX512_BF16 | {"amx"}, MachineLimits(30e9, 150e9, 1500e9, 3000e9)),
    CpuTier("neon", frozenset({"neon"}), MachineLimits(25e9, 45e9, 45e9, 180e9), "aarch64"),
)
"""All instruction sets, for each architecture from the least to the most capable.
``Platform.parse`` accepts the names of x86 instruction sets with a ``core`` after ``cpu:``."""

X86_TIERS = {
    tier.name: tier for tier in CPU_TIERS if tier.machine == "x86_64" and tier.core is not None
}

NATIVE_LIBRARY = "native:compressed_linear"
"""Member of ``Platform.ops`` if our compiled library is present."""


@dataclass(frozen=True)
class Platform:
    """device: "cpu", "cuda", "rocm" or "xpu". ``capability``: 10·major + minor of a CUDA device.

    ``features``: CPU instruction sets. ``isa``: the one with which our library's kernels run, empty
    for a machine made by hand and without the library. ``ops``: compiled operators that can be
    called, named ``namespace::op``, and ``NATIVE_LIBRARY``. ``missing``: the reason for each absent
    op or library. ``cpu``: the processor's name, empty for a machine made by hand. ``measured``:
    its measured limits with these threads, or None. ``gpu``: the GPU's name; ``multiprocessors``
    and ``read`` (bytes per second) as its driver reports them; empty and 0 for an absent GPU.
    """

    device: str = "cpu"
    machine: str = "x86_64"
    features: frozenset[str] = frozenset()
    capability: int | None = None
    ops: frozenset[str] = frozenset()
    missing: tuple[tuple[str, str], ...] = ()
    threads: int = 1
    cpu: str = ""
    measured: MachineLimits | None = None
    gpu: str = ""
    multiprocessors: int = 0
    read: float = 0.0
    isa: str = ""

    @property
    def limits(self) -> MachineLimits:
        """The measured limits, or else those declared for such machines."""
        if self.measured is not None:
            return self.measured
        if self.device == "cuda":
            return gpu_limits(self.capability or 0, self.multiprocessors, self.read)
        if self.device != "cpu":
            return ACCELERATOR
        # What its instructions reach, whether or not our kernels use them.
        assert self.tier.core is not None
        return limits_of_cores(self.tier.core, self.threads)

    @property
    def compute_units(self) -> int:
        """Multiprocessors of the GPU, or of the product that represents its capability; else 0."""
        if self.device != "cuda":
            return 0
        return self.multiprocessors or gpu_facts(self.capability or 0).multiprocessors

    @property
    def name(self) -> str:
        """Short name, e.g. ``cpu:avx512bf16`` or ``cuda:90``. For this machine's CPU it has the
        instruction set in use, which need not be the best that the CPU has."""
        if self.device == "cuda":
            return f"cuda:{self.capability}"
        if self.device == "cpu":
            x86 = self.machine == "x86_64"
            return f"cpu:{(self.isa or self.tier.name) if x86 else self.machine}"
        return self.device

    @property
    def tier(self) -> CpuTier:
        """The most capable instruction set of the processor that has a platform name."""
        return [tier for tier in self._tiers() if tier.core is not None][-1]

    def best_isa(self, names: Collection[str]) -> str:
        """The instruction set of ``names``, which include "generic", that the library would choose
        there. Never AMX: whether it is faster is not measured at start."""
        return [t.name for t in self._tiers() if t.name in names and t.name != "amx"][-1]

    def _tiers(self) -> list[CpuTier]:
        machines = (CPU_TIERS[0].machine, self.machine)
        return [t for t in CPU_TIERS if t.machine in machines and t.features <= self.features]

    @property
    def assumption(self) -> str:
        """Assumptions about an absent GPU, in a sentence; empty for other platforms."""
        if self.device != "cuda" or self.gpu:
            return ""
        facts = gpu_facts(self.capability or 0)
        return (
            f"{self.name} is not this machine: that it has our compiled library and the operators "
            f"of {CUDA_WHEEL}'s CUDA wheel is assumed, and times are estimated from published "
            f"numbers of the {facts.product}"
        )

    def why_missing(self, op: str) -> str:
        """Reason for an op that is not in ``ops``."""
        return dict(self.missing).get(op, f"{op} is not available on {self.name}")

    @classmethod
    def parse(cls, text: str) -> Platform:
        """``cpu``, ``cpu:avx2``, ``cuda:90``, … as a machine with everything built: our library,
        and for a GPU all operators of vLLM's CUDA wheel (``vllm_wheel``).

        ``cpu`` and an empty text mean this machine, ``cuda`` its GPU; ``rocm`` and ``xpu`` an
        unprobed device of that kind. Raises ``ValueError`` for an unknown name.
        """
        if text in ("", "cpu"):
            return cls.detect()
        if text == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(
                    "platform cuda is this machine's GPU, and torch finds none; an absent GPU "
                    "is named by its compute capability, as in cuda:90"
                )
            return cls.detect("cuda")
        device, _, detail = text.partition(":")
        built = frozenset({NATIVE_LIBRARY})
        if device == "cpu" and detail in X86_TIERS:
            return cls("cpu", "x86_64", X86_TIERS[detail].features, ops=built)
        if device == "cpu" and detail == "aarch64":
            return cls("cpu", "aarch64", frozenset({"neon"}), ops=built)
        if device == "cuda" and detail.isdigit() and 50 <= int(detail) < 200:
            return cls("cuda", "x86_64", capability=int(detail), ops=built | CUDA_OPS)
        if text in ("rocm", "xpu"):
            return cls(text)
        raise ValueError(
            f"unknown platform {text!r} (known: cpu, "
            + ", ".join(f"cpu:{tier}" for tier in X86_TIERS)
            + ", cpu:aarch64, cuda, cuda:80, cuda:90, …, rocm, xpu)"
        )

    @classmethod
    def detect(cls, device: str = "cpu") -> Platform:
        """This machine as ``device``, with the operators that are loaded in this process."""
        reason = native.available()
        missing = () if reason is None else ((NATIVE_LIBRARY, reason),)
        found = _gpu() if device == "cuda" else _Gpu()
        return cls(
            device=device,
            capability=found.capability,
            gpu=found.name,
            multiprocessors=found.multiprocessors,
            read=found.read,
            machine=_host.machine(),
            features=cpu_features(),
            ops=frozenset({NATIVE_LIBRARY}) if reason is None else frozenset(),
            missing=missing,
            threads=torch.get_num_threads(),
            cpu=cpu_name(),
            isa=_isa_in_use() if device == "cpu" and reason is None else "",
        )


@dataclass(frozen=True)
class _Gpu:
    capability: int | None = None
    name: str = ""
    multiprocessors: int = 0
    read: float = 0.0


def _gpu() -> _Gpu:
    """The GPU of this process, as the driver reports it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # Memory transfers data twice per cycle; older versions of torch have neither number.
    kilohertz = getattr(properties, "memory_clock_rate", 0)
    bits = getattr(properties, "memory_bus_width", 0)
    return _Gpu(
        10 * properties.major + properties.minor,
        properties.name,
        properties.multi_processor_count,
        2e3 * kilohertz * bits / 8,
    )


def _isa_in_use() -> str:
    from vllm.compressed_linear.machine import native

    try:
        return native.isa()
    except ValueError:  # a forced one is not supported here: the first op reports it
        return ""


def cpu_features() -> frozenset[str]:
    """Instruction sets of this CPU that kernels use, probed by our library, or by PyTorch if the
    library was not built."""
    if native.available() is None:
        runs = {*native.supported_isas("floats"), *native.supported_isas("integers")}
        return frozenset().union(*(tier.features for tier in CPU_TIERS if tier.name in runs))
    capabilities = torch.backends.cpu.get_cpu_capability()
    found = set()
    probes = {
        "avx2": lambda: capabilities in ("AVX2", "AVX512"),
        "avx512": lambda: capabilities == "AVX512",
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
        "avx512_vnni": torch.cpu._is_vnni_supported,
        "amx": torch.cpu._is_amx_tile_supported,
    }
    for name, probe in probes.items():
        if probe():
            found.add(name)
    if _host.machine() in ("aarch64", "arm64"):
        found.add("neon")
    return frozenset(found)
