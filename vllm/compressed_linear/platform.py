# SPDX-License-Identifier: Apache-2.0
"""What a machine can do, as a value: nothing here is asked of the machine after ``detect``.

Tests and ``explain --platform`` make platforms by hand, so selection can be tried for machines
that are not there.
"""

from __future__ import annotations

import platform as _host
from dataclasses import dataclass, replace

import torch

from vllm.compressed_linear.machine import MachineLimits, cpu_name, declared_limits

X86_TIERS: dict[str, frozenset[str]] = {
    "generic": frozenset(),
    "avx2": frozenset({"avx2"}),
    "avx512": frozenset({"avx2", "avx512"}),
    "avx512bf16": frozenset({"avx2", "avx512", "avx512_bf16", "avx512_vnni"}),
    "amx": frozenset({"avx2", "avx512", "avx512_bf16", "avx512_vnni", "amx"}),
}
"""Names accepted behind ``cpu:`` in ``Platform.parse``, with the features each stands for."""

NATIVE_LIBRARY = "native:compressed_linear"
"""Member of ``Platform.ops`` when our compiled library is present."""


@dataclass(frozen=True)
class Platform:
    """device: "cpu", "cuda", "rocm" or "xpu". ``capability``: 10·major + minor of a CUDA device.

    ``features``: CPU instruction sets. ``ops``: compiled operators that can be called, named
    ``namespace::op``, and ``NATIVE_LIBRARY``. ``missing``: for an absent op or library, why.
    ``cpu``: the processor's name, empty for a machine made by hand. ``measured``: its limits with
    these threads, where somebody measured them.
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

    @property
    def limits(self) -> MachineLimits:
        """The measured limits, or else those declared for such machines."""
        return self.measured or declared_limits(self.name, self.threads)

    @property
    def name(self) -> str:
        """Short name for people, e.g. ``cpu:avx512bf16`` or ``cuda:90``."""
        if self.device == "cuda":
            return f"cuda:{self.capability}"
        if self.device == "cpu":
            tier = [n for n, f in X86_TIERS.items() if f <= self.features][-1]
            return f"cpu:{tier}" if self.machine == "x86_64" else f"cpu:{self.machine}"
        return self.device

    def why_missing(self, op: str) -> str:
        """Reason text for an op that is not in ``ops``."""
        return dict(self.missing).get(op, f"{op} is not available on {self.name}")

    def with_ops(self, *ops: str) -> Platform:
        """The same machine with more operators."""
        return replace(self, ops=self.ops | frozenset(ops))

    @classmethod
    def parse(cls, text: str) -> Platform:
        """``cpu``, ``cpu:avx2``, ``cuda:90``, … as a machine with everything built.

        ``cpu`` and an empty text mean this machine. ``ValueError`` for an unknown name.
        """
        if text in ("", "cpu"):
            return cls.detect()
        device, _, detail = text.partition(":")
        built = frozenset({NATIVE_LIBRARY})
        if device == "cpu" and detail in X86_TIERS:
            return cls("cpu", "x86_64", X86_TIERS[detail], ops=built)
        if device == "cpu" and detail == "aarch64":
            return cls("cpu", "aarch64", frozenset({"neon"}), ops=built)
        if device == "cuda" and detail.isdigit() and 50 <= int(detail) < 200:
            return cls("cuda", "x86_64", capability=int(detail), ops=built)
        raise ValueError(
            f"unknown platform {text!r} (known: cpu, "
            + ", ".join(f"cpu:{tier}" for tier in X86_TIERS)
            + ", cpu:aarch64, cuda:80, cuda:90, …)"
        )

    @classmethod
    def detect(cls, device: str = "cpu") -> Platform:
        """This machine as ``device``, with the operators that are loaded in this process."""
        from vllm.compressed_linear import native

        reason = native.available()
        missing = () if reason is None else ((NATIVE_LIBRARY, reason),)
        capability = None
        if device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            capability = 10 * major + minor
        return cls(
            device=device,
            capability=capability,
            machine=_host.machine(),
            features=cpu_features(),
            ops=frozenset({NATIVE_LIBRARY}) if reason is None else frozenset(),
            missing=missing,
            threads=torch.get_num_threads(),
            cpu=cpu_name(),
        )


def cpu_features() -> frozenset[str]:
    """Instruction sets of this CPU that matter to kernels, as PyTorch's own probe reports them."""
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
