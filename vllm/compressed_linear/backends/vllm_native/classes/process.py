# SPDX-License-Identifier: Apache-2.0
"""Process state for vLLM's kernel classes: platform, default dtype, configuration.

Their checks ask for the platform of this process; ``pretending`` replaces it, so that the plan of a
GPU can be made on a machine without one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from vllm.compressed_linear.machine.platform import Platform

_LOCK = threading.RLock()


def device() -> str:
    """``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"xpu"``: where this process runs its model, or is
    pretended to."""
    from vllm.platforms import current_platform

    for name in ("cpu", "rocm", "xpu"):
        if getattr(current_platform, f"is_{name}")():
            return name
    return "cuda"


@cache
def _here() -> tuple[str, int | None]:
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    return device(), None if capability is None else capability.to_int()


def is_here(platform: Platform) -> bool:
    """Whether ``platform`` is the kind of device that this process runs on."""
    return (platform.device, platform.capability) == _here()


@contextmanager
def pretending(platform: Platform) -> Iterator[None]:
    """Within it vLLM takes ``platform`` for the one it runs on, as far as its kernel classes ask.

    Nothing changes on such a platform itself. Otherwise one thread at a time may be in here: vLLM
    has one object for its platform, and that is what changes.
    """
    if is_here(platform):
        yield
        return
    from vllm.model_executor.kernels.linear.scaled_mm import cutlass
    from vllm.model_executor.layers.quantization.utils import nvfp4_utils
    from vllm.platforms import current_platform

    from vllm import _custom_ops

    known = {
        "cutlass_scaled_mm_supports_fp8": lambda capability: capability >= 89,
        "cutlass_scaled_mm_supports_block_fp8": lambda capability: capability >= 90,
        "cutlass_scaled_mm_supports_fp4": lambda capability: 100 <= capability < 130,
    }
    with _LOCK:
        real = type(current_platform)
        kept = {
            (owner, name): getattr(owner, name)
            for owner in (_custom_ops, nvfp4_utils)
            for name in known
            if hasattr(owner, name)
        }
        block = cutlass.CUTLASS_BLOCK_FP8_SUPPORTED
        try:
            current_platform.__class__ = _pretended(platform)
            for owner, name in kept:
                setattr(owner, name, known[name])
            cutlass.CUTLASS_BLOCK_FP8_SUPPORTED = (
                platform.device == "cuda" and (platform.capability or 0) >= 90
            )
            yield
        finally:
            current_platform.__class__ = real
            for (owner, name), function in kept.items():
                setattr(owner, name, function)
            cutlass.CUTLASS_BLOCK_FP8_SUPPORTED = block


@cache
def _pretended(platform: Platform) -> type:
    """A class of vLLM's platforms that says of itself what ``platform`` is."""
    from vllm.platforms import PlatformEnum
    from vllm.platforms.interface import DeviceCapability
    from vllm.platforms.interface import Platform as VllmPlatform

    capability = platform.capability
    multiprocessors = platform.compute_units

    class Pretended(VllmPlatform):  # type: ignore[misc,unused-ignore]
        _enum = getattr(PlatformEnum, platform.device.upper())
        device_name = platform.device
        device_type = "cuda" if platform.device in ("cuda", "rocm") else platform.device
        dispatch_key = "CUDA"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return None if capability is None else DeviceCapability(*divmod(capability, 10))

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return platform.name

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return multiprocessors

        @classmethod
        def supports_fp8(cls) -> bool:
            return cls.has_device_capability(89)

    return Pretended


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it ``dtype`` is torch's default, as it is while vLLM loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def configured() -> Iterator[None]:
    """Within it there is a vLLM configuration, as constructors of kernel classes ask for one: that
    of the engine where it is being built, else one with every default."""
    from vllm.config import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config

    if get_current_vllm_config_or_none() is not None:
        yield
        return
    with set_current_vllm_config(VllmConfig()):
        yield
