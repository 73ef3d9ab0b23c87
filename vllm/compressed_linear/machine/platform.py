# SPDX-License-Identifier: Apache-2.0
"""What a machine can do, as a value: nothing here is asked of the machine after ``detect``.

Tests and ``explain --platform`` make platforms by hand, so selection can be tried for machines
that are not there.
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

    ``features``: what processors have that run it, as in ``Platform.features``. ``core``: declared
    limits of one core near 3 GHz, instructions a cycle times the width of a register, less what the
    clock loses under them; without units for bf16 its rate is that of fp32. None for one that no
    platform is named after. ``machine``: the processor's architecture.
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
"""Of each architecture from the least to the most. Names of those of x86 that have a ``core`` are
accepted behind ``cpu:`` in ``Platform.parse``."""

X86_TIERS = {
    tier.name: tier for tier in CPU_TIERS if tier.machine == "x86_64" and tier.core is not None
}

NATIVE_LIBRARY = "native:compressed_linear"
"""Member of ``Platform.ops`` when our compiled library is present."""


@dataclass(frozen=True)
class Platform:
    """device: "cpu", "cuda", "rocm" or "xpu". ``capability``: 10·major + minor of a CUDA device.

    ``features``: CPU instruction sets. ``isa``: the one that our library's kernels run with, empty
    for a machine made by hand and where there is no library. ``ops``: compiled operators that can
    be called, named ``namespace::op``, and ``NATIVE_LIBRARY``. ``missing``: for an absent op or
    library, why. ``cpu``: the processor's name, empty for a machine made by hand. ``measured``: its
    limits with these threads, where somebody measured them. ``gpu``: the GPU's name, and
    ``multiprocessors`` and ``read`` (bytes a second) as its driver tells them; empty and 0 for one
    that is not there.
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
        """Multiprocessors of the GPU, or of the one that stands for its capability; else 0."""
        if self.device != "cuda":
            return 0
        return self.multiprocessors or gpu_facts(self.capability or 0).multiprocessors

    @property
    def name(self) -> str:
        """Short name for people, e.g. ``cpu:avx512bf16`` or ``cuda:90``. Of this machine's CPU it
        names the instruction set that runs, which need not be the best that the CPU has."""
        if self.device == "cuda":
            return f"cuda:{self.capability}"
        if self.device == "cpu":
            x86 = self.machine == "x86_64"
            return f"cpu:{(self.isa or self.tier.name) if x86 else self.machine}"
        return self.device

    @property
    def tier(self) -> CpuTier:
        """The most that the processor has of what platforms are named after."""
        return [tier for tier in self._tiers() if tier.core is not None][-1]

    def best_isa(self, names: Collection[str]) -> str:
        """The one of ``names``, "generic" among them, that the library would take there. AMX
        is not: whether it is faster is not measured at start."""
        return [t.name for t in self._tiers() if t.name in names and t.name != "amx"][-1]

    def _tiers(self) -> list[CpuTier]:
        machines = (CPU_TIERS[0].machine, self.machine)
        return [t for t in CPU_TIERS if t.machine in machines and t.features <= self.features]

    @property
    def assumption(self) -> str:
        """What is taken for granted of a GPU that is not there, in a sentence; empty for others."""
        if self.device != "cuda" or self.gpu:
            return ""
        facts = gpu_facts(self.capability or 0)
        return (
            f"{self.name} is not this machine: that it has our compiled library and the operators "
            f"of {CUDA_WHEEL}'s CUDA wheel is assumed, and times are estimated from published "
            f"numbers of the {facts.product}"
        )

    def why_missing(self, op: str) -> str:
        """Reason text for an op that is not in ``ops``."""
        return dict(self.missing).get(op, f"{op} is not available on {self.name}")

    @classmethod
    def parse(cls, text: str) -> Platform:
        """``cpu``, ``cpu:avx2``, ``cuda:90``, … as a machine with everything built: our library,
        and for a GPU all operators of vLLM's CUDA wheel (``vllm_wheel``).

        ``cpu`` and an empty text mean this machine, ``cuda`` its GPU; ``rocm`` and ``xpu`` one of
        which nothing is known but the name. ``ValueError`` for an unknown one.
        """
        if text in ("", "cpu"):
            return cls.detect()
        if text == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(
                    "platform cuda is this machine's GPU, and torch finds none; one that is "
                    "elsewhere is named by its compute capability, as in cuda:90"
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
    """The GPU of this process, as torch's driver tells of it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # Memory moves data twice a cycle; both numbers are missing in older versions of torch.
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
    except ValueError:  # one is asked for that is not here: the first op that needs it says so
        return ""


def cpu_features() -> frozenset[str]:
    """Instruction sets of this CPU that matter to kernels, as our library finds them; where it was
    not built, as PyTorch's own probes do."""
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
