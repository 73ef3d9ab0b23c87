# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernel classes for accelerators: which there are, what they say, and how they are built.

vLLM keeps one table of classes for each family of quantization, in its order of preference. Their
checks ask the platform that this process runs on; ``pretending`` lets them be asked about another
one, so that the plan of a GPU can be made on a machine that has none. vLLM is imported only inside
functions: importing it takes seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch

from vllm.compressed_linear.machine.platform import Platform

KERNELS = "vllm.model_executor.kernels.linear"

TABLES = {
    "mixed precision": "_POSSIBLE_KERNELS",
    "int8": "_POSSIBLE_INT8_KERNELS",
    "fp8": "_POSSIBLE_FP8_KERNELS",
    "fp8 blocks": "_POSSIBLE_FP8_BLOCK_KERNELS",
    "fp8 weights": "_POSSIBLE_WFP8A16_KERNELS",
    "nvfp4": "_POSSIBLE_NVFP4_KERNELS",
    "mxfp4": "_POSSIBLE_MXFP4_KERNELS",
    "mxfp6": "_POSSIBLE_MXFP6_KERNELS",
    "mxfp8": "_POSSIBLE_MXFP8_KERNELS",
}
"""Family of quantization → the name of vLLM's table of classes by platform."""

_LOCK = threading.RLock()


@cache
def unavailable(family: str) -> str | None:
    """Why this vLLM has no kernel classes of ``family`` that can be asked, or None."""
    try:
        module = import_module(KERNELS)
    except Exception as error:  # whatever a broken installation raises, it is a reason
        return f"vLLM's kernel classes cannot be imported: {error}"
    if not hasattr(module, TABLES[family]):
        return f"this vLLM has no table of {family} kernels ({KERNELS}.{TABLES[family]})"
    return None


def kernel_classes(family: str, device: str) -> list[type]:
    """vLLM's classes of ``family`` for ``device``, in vLLM's order of preference."""
    from vllm.platforms import PlatformEnum

    table = getattr(import_module(KERNELS), TABLES[family])
    return list(dict.fromkeys(table.get(getattr(PlatformEnum, device.upper(), None), ())))


def kernel_class(family: str, device: str, name: str) -> Any:
    """vLLM's class ``name``; ``ValueError`` if this vLLM has none."""
    found = [kernel for kernel in kernel_classes(family, device) if kernel.__name__ == name]
    if not found:
        raise ValueError(f"this vLLM has no {family} kernel class {name} for {device}")
    return found[0]


def refusal(kernel: Any, config: object, platform: Platform) -> str | None:
    """Why vLLM's class does not run ``config`` on ``platform``, or None if it does.

    Classes have ``is_supported`` or ``get_min_capability`` besides ``can_implement``, as vLLM's
    own selection asks them.
    """
    from vllm import envs

    if kernel.__name__ in getattr(envs, "VLLM_DISABLED_KERNELS", ()):
        return "disabled by VLLM_DISABLED_KERNELS"
    with pretending(platform):
        try:
            if hasattr(kernel, "is_supported"):
                able, reason = kernel.is_supported(platform.capability)
                if not able:
                    return str(reason or "not supported here")
            elif platform.device == "cuda":
                least = kernel.get_min_capability()
                if least > (platform.capability or 0):
                    return f"needs compute capability {least} (this is {platform.capability})"
            able, reason = kernel.can_implement(config)
        except Exception as error:  # a check that fails is a refusal, not the end of the selection
            return f"its check failed with {type(error).__name__}: {error}"
    return None if able else str(reason or "no reason given")


def missing_op(op: str, platform: Platform) -> str | None:
    """Why the operator ``namespace::name`` cannot be called on ``platform``, or None.

    On the device of this process the loaded libraries are asked; for another the platform knows.
    """
    if op in platform.ops:
        return None
    if not is_here(platform):
        return platform.why_missing(op)
    from vllm import _custom_ops  # noqa: F401  # it loads the library of this machine

    namespace, _, name = op.partition("::")
    if hasattr(getattr(torch.ops, namespace), name):
        return None
    return f"vLLM's library here has no operator {op}"


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
        with nullcontext():
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


FP8_NAMES = ["weight", "weight_scale", "input_scale", "input_scale_ub"]
"""Parameter names that classes for fp8 are told to use."""


INT8_NAMES = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
"""The same for int8."""


def int8_config(*, static: bool, symmetric: bool) -> object:
    """vLLM's ``Int8ScaledMMLinearLayerConfig`` for a weight with a scale for each channel."""
    from vllm.model_executor.kernels.linear.scaled_mm import Int8ScaledMMLinearLayerConfig

    return Int8ScaledMMLinearLayerConfig(
        is_static_input_scheme=static, is_channelwise=True, input_symmetric=symmetric
    )


def fp8_config(
    n: int,
    k: int,
    dtype: torch.dtype,
    *,
    weight: str,
    activation: str,
    out_dtype: torch.dtype | None = None,
) -> object:
    """vLLM's ``FP8ScaledMMLinearLayerConfig`` for a weight [n, k] and x of ``dtype``.

    ``weight``: what shares its scales, "tensor", "channel" or "block" of 128×128; ``activation``:
    "static tensor", "dynamic tensor", "dynamic token" or "dynamic group" of 128; ``out_dtype``: of
    the result, that of x if it is None.
    """
    from vllm.model_executor.kernels.linear import FP8ScaledMMLinearLayerConfig
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    weights = {
        "tensor": keys.kFp8StaticTensorSym,
        "channel": keys.kFp8StaticChannelSym,
        "block": keys.kFp8Static128BlockSym,
    }
    activations = {
        "static tensor": keys.kFp8StaticTensorSym,
        "dynamic tensor": keys.kFp8DynamicTensorSym,
        "dynamic token": keys.kFp8DynamicTokenSym,
        "dynamic group": keys.kFp8Dynamic128Sym,
    }
    return FP8ScaledMMLinearLayerConfig(
        weight_quant_key=weights[weight],
        activation_quant_key=activations[activation],
        weight_shape=(n, k),
        input_dtype=dtype,
        out_dtype=out_dtype or dtype,
    )


def nvfp4_config() -> object:
    """vLLM's ``NvFp4LinearLayerConfig``."""
    from vllm.model_executor.kernels.linear import NvFp4LinearLayerConfig

    return NvFp4LinearLayerConfig()


def mxfp4_config() -> object:
    """vLLM's ``MxFp4LinearLayerConfig`` for x that is not quantised."""
    from vllm.model_executor.kernels.linear import MxFp4LinearLayerConfig

    return MxFp4LinearLayerConfig()


def mxfp8_config(n: int, k: int) -> object:
    """vLLM's ``Mxfp8LinearLayerConfig`` of a weight [n, k]."""
    from vllm.model_executor.kernels.linear import Mxfp8LinearLayerConfig

    return Mxfp8LinearLayerConfig(weight_shape=(n, k))


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


def quantize_without_compiler(kernel: Any) -> None:
    """Make a kernel object quantise x by vLLM's compiled operator and not by the Python code that
    vLLM leaves to its compiler: inside an operator of ours no compiler sees it."""
    quantizer = getattr(kernel, "quant_fp8", None)
    if quantizer is not None:
        quantizer._forward_method = quantizer.forward_cuda


def device() -> str:
    """``"cpu"``, ``"cuda"``, ``"rocm"`` or ``"xpu"``: where this process runs its model, or is
    pretended to."""
    from vllm.platforms import current_platform

    for name in ("cpu", "rocm", "xpu"):
        if getattr(current_platform, f"is_{name}")():
            return name
    return "cuda"
