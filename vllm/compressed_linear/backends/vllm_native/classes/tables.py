# SPDX-License-Identifier: Apache-2.0
"""vLLM's tables of kernel classes: one for each family of quantization, in its order of preference.

vLLM is imported only inside functions: importing it takes seconds.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from importlib import import_module
from typing import Any

from vllm.compressed_linear.backends.vllm_native.classes.process import pretending
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


@cache
def unavailable(family: str) -> str | None:
    """Why this vLLM has no kernel classes of ``family`` that can be asked and driven, or None."""
    try:
        module = import_module(KERNELS)
    except Exception as error:  # whatever a broken installation raises, it is a reason
        return f"vLLM's kernel classes cannot be imported: {error}"
    if not hasattr(module, TABLES[family]):
        return f"this vLLM has no table of {family} kernels ({KERNELS}.{TABLES[family]})"
    return _other_interface() if family == "mixed precision" else None


def _other_interface() -> str | None:
    """What mixed-precision classes of this vLLM need or lack that is not known here, or None."""
    try:
        from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
            MPLinearKernel,
            MPLinearLayerConfig,
        )
        from vllm.model_executor.parameter import BasevLLMParameter
        from vllm.platforms import PlatformEnum, current_platform
        from vllm.scalar_type import ScalarType
    except Exception as error:  # whatever a broken installation raises, it is a reason
        return f"vLLM's mixed-precision kernel classes cannot be imported: {error}"
    known = {
        "full_weight_shape",
        "partition_weight_shape",
        "weight_type",
        "act_type",
        "group_size",
        "zero_points",
        "has_g_idx",
    }
    missing = dataclasses.MISSING
    for field in dataclasses.fields(MPLinearLayerConfig):
        required = field.default is missing and field.default_factory is missing
        if required and field.name not in known:
            return f"MPLinearLayerConfig of this vLLM needs {field.name!r}, which is not known here"
    taken = inspect.signature(MPLinearKernel.__init__).parameters
    for name in ("c", "w_q_param_name", "w_s_param_name", "w_zp_param_name"):
        if name not in taken:
            return f"MPLinearKernel of this vLLM takes no {name!r} (it takes {', '.join(taken)})"
    for owner, name in (
        (MPLinearKernel, "can_implement"),
        (MPLinearKernel, "process_weights_after_loading"),
        (MPLinearKernel, "apply_weights"),
        (ScalarType, "uint"),
        (PlatformEnum, "CPU"),
        (current_platform, "is_cpu"),
        (BasevLLMParameter, "weight_loader"),
    ):
        if not hasattr(owner, name):
            return f"{getattr(owner, '__name__', owner)} of this vLLM has no {name!r}"
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


def disabled(kernel: type) -> str | None:
    """Why the user does not want vLLM's class, or None."""
    from vllm import envs

    named = kernel.__name__ in getattr(envs, "VLLM_DISABLED_KERNELS", ())
    return "disabled by VLLM_DISABLED_KERNELS" if named else None


def refusal(kernel: Any, config: object, platform: Platform) -> str | None:
    """Why vLLM's class does not run ``config`` on ``platform``, or None if it does.

    Classes have ``is_supported`` or ``get_min_capability`` besides ``can_implement``, as vLLM's
    own selection asks them.
    """
    if (unwanted := disabled(kernel)) is not None:
        return unwanted
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
