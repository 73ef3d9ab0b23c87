# SPDX-License-Identifier: Apache-2.0
"""The profile of the processor that this process runs on."""

from __future__ import annotations

import logging
import os
import platform as _host
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from vllm.compressed_linear.machine import native, rates, rates_file
from vllm.compressed_linear.machine.isas import features_of
from vllm.compressed_linear.machine.limits import cpu_name
from vllm.compressed_linear.machine.profiles import PROFILES, Profile, plain_profile
from vllm.compressed_linear.settings import CPU_PROFILE, rates_path

# A child of vLLM's logger, so that its handlers get the line; this module does not import vLLM.
logger = logging.getLogger(__name__)


def profile_here() -> Profile:
    """The profile that ``VLLM_COMPRESSED_LINEAR_CPU_PROFILE`` names, or else the one that fits the
    rates of this machine, which are measured once, or the published one of its kind where they
    cannot be kept. ``ValueError`` for an unknown name."""
    forced = os.environ.get(CPU_PROFILE, "")
    if forced:
        return _forced(forced)
    file = rates_path() if native.available() is None else None
    return _found(cpu_name(), _host.machine(), cpu_features(), file)


def _forced(name: str) -> Profile:
    if name not in PROFILES:
        raise ValueError(f"{CPU_PROFILE} is {name!r}, expected one of {', '.join(PROFILES)}")
    return replace(PROFILES[name], origin=f"named by {CPU_PROFILE}", by_name={})


@lru_cache(maxsize=8)
def _found(cpu: str, machine: str, features: frozenset[str], file: Path | None) -> Profile:
    """Once for each process, so that all layers are chosen by the same rates."""
    if file is not None:
        try:
            measured = rates_file.kept(file, rates_file.RatesKey.of(cpu), rates.measure)
        except OSError as error:
            logger.warning(
                "The rates of this processor cannot be kept in %s (%s), so instruction sets are "
                "chosen by its published profile.",
                file,
                error,
            )
        else:
            fit = rates.fitted(measured, cpu, machine, features)
            return replace(fit, origin="rates measured here", by_name={})
    known = published(cpu, machine, features)
    return replace(known, origin="published rates", by_name={})


def published(cpu: str, machine: str, features: frozenset[str]) -> Profile:
    """The profile of a processor called ``cpu`` (see ``limits.cpu_name``), or else the plain one of
    its ``features``, or else the first that has them all. A virtual machine may hide features of
    the processor."""
    fitting = [p for p in PROFILES.values() if p.machine == machine and features <= p.features]
    named = [p for p in fitting if p.known_as and cpu.endswith(p.known_as)]
    exact = [p for p in fitting if p.features == features]
    return (*named, *exact, *fitting, plain_profile(machine, features))[0]


def cpu_features() -> frozenset[str]:
    """Instruction sets of this CPU that kernels use, probed by our library, or by PyTorch if the
    library was not built."""
    if native.available() is None:
        return features_of({*native.supported_isas("floats"), *native.supported_isas("integers")})
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
