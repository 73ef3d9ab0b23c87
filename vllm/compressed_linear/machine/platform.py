# SPDX-License-Identifier: Apache-2.0
"""Capabilities of a machine, as a value: probed once, by ``detect``.

Tests and ``explain --platform`` make platforms by hand, so selection can be tried for machines
that are absent.
"""

from __future__ import annotations

import os
import platform as _host
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
from vllm.compressed_linear.machine.profiles import PROFILES, Profile, plain_profile
from vllm.compressed_linear.machine.this_cpu import cpu_features, profile_here
from vllm.compressed_linear.machine.vllm_wheel import CUDA_OPS, CUDA_WHEEL
from vllm.compressed_linear.settings import CPU_ISA

NATIVE_LIBRARY = "native:compressed_linear"
"""Member of ``Platform.ops`` if our compiled library is present."""


@dataclass(frozen=True)
class Platform:
    """device: "cpu", "cuda", "rocm" or "xpu". ``capability``: 10·major + minor of a CUDA device.

    ``features``: CPU instruction sets. ``profile``: rates of the processor, None for other devices
    and where only ``features`` are known. ``isa``: the instruction set that the user forces on this
    machine's kernels, or empty. ``ops``: compiled operators that can be called, named
    ``namespace::op``, and ``NATIVE_LIBRARY``. ``missing``: the reason for each absent
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
    profile: Profile | None = None

    @property
    def rates(self) -> Profile:
        """The processor's profile, or the one that stands for its features."""
        return self.profile or plain_profile(self.machine, self.features)

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
        return limits_of_cores(self.rates.core(self.features), self.threads)

    @property
    def compute_units(self) -> int:
        """Multiprocessors of the GPU, or of the product that represents its capability; else 0."""
        if self.device != "cuda":
            return 0
        return self.multiprocessors or gpu_facts(self.capability or 0).multiprocessors

    @property
    def name(self) -> str:
        """Short name, e.g. ``cpu:zen4`` or ``cuda:90``; of a CPU that of its profile, or the
        instruction set that is forced."""
        if self.device == "cuda":
            return f"cuda:{self.capability}"
        return f"cpu:{self.isa or self.rates.name}" if self.device == "cpu" else self.device

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
        """``cpu``, ``cpu:zen4``, ``cuda:90``, … as a machine with everything built: our library,
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
        if device == "cpu" and detail in PROFILES:
            profile = PROFILES[detail]
            return cls("cpu", profile.machine, profile.features, ops=built, profile=profile)
        if device == "cuda" and detail.isdigit() and 50 <= int(detail) < 200:
            return cls("cuda", "x86_64", capability=int(detail), ops=built | CUDA_OPS)
        if text in ("rocm", "xpu"):
            return cls(text)
        raise ValueError(
            f"unknown platform {text!r} (known: cpu, "
            + ", ".join(f"cpu:{name}" for name in PROFILES)
            + ", cuda, cuda:80, cuda:90, …, rocm, xpu)"
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
            isa=os.environ.get(CPU_ISA, "") if device == "cpu" and reason is None else "",
            profile=profile_here() if device == "cpu" else None,
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
