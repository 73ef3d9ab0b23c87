# SPDX-License-Identifier: Apache-2.0
"""Every private name of vLLM's mixed-precision kernel classes, by feature detection.

vLLM's classes take a configuration without bias, channel order or dtype of scales, answer with the
first reason only, never ask whether their operator was built, and repack the parameters of a layer
in place. Here they are asked axis by axis, and given a light layer of vLLM's own parameter class.
vLLM is imported only inside functions: importing it takes seconds.
"""

from __future__ import annotations

import dataclasses
import inspect
import mmap
import platform as _host
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.elements import torch_dtype

CODES, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero_point"
"""Parameter names that vLLM's kernel classes are told to use."""


@dataclass(frozen=True)
class KernelRequest:
    """What ``MPLinearLayerConfig`` is made of. ``bias``: code that means 0; ``group_size``: −1 is
    all of K; ``dtype``: name of the activations' dtype."""

    k: int
    n: int
    bits: int
    bias: int
    zero_points: bool
    group_size: int
    dtype: str


@cache
def unavailable() -> str | None:
    """Why this vLLM has no mixed-precision kernel classes that we can drive, or None."""
    try:
        from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
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
        (_POSSIBLE_KERNELS, "get"),
        (BasevLLMParameter, "weight_loader"),
    ):
        if not hasattr(owner, name):
            return f"{getattr(owner, '__name__', owner)} of this vLLM has no {name!r}"
    return None


def kernel_classes(device: str) -> list[type]:
    """vLLM's mixed-precision kernel classes for ``device``, in vLLM's order of preference."""
    from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
    from vllm.platforms import PlatformEnum

    member = getattr(PlatformEnum, device.upper(), None)
    return list(dict.fromkeys(_POSSIBLE_KERNELS.get(member, ())))


def mixed_precision_config(request: KernelRequest) -> Any:
    """vLLM's ``MPLinearLayerConfig`` of ``request``."""
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.scalar_type import ScalarType

    values = {
        "full_weight_shape": (request.k, request.n),
        "partition_weight_shape": (request.k, request.n),
        "weight_type": ScalarType.uint(request.bits, request.bias or None),
        "act_type": torch_dtype(request.dtype),
        "group_size": request.group_size,
        "zero_points": request.zero_points,
        "has_g_idx": False,
    }
    fields = {field.name for field in dataclasses.fields(MPLinearLayerConfig)}
    return MPLinearLayerConfig(**{name: value for name, value in values.items() if name in fields})


def class_reasons(kernel: type, request: KernelRequest) -> list[str]:
    """Every reason why vLLM's class declines ``request`` (empty: it accepts).

    vLLM's answer stops at the first rule that is broken, so each axis is also asked by itself with
    everything else as vLLM likes it best.
    """
    from vllm import envs

    if kernel.__name__ in getattr(envs, "VLLM_DISABLED_KERNELS", ()):
        return ["disabled by VLLM_DISABLED_KERNELS"]
    refusal = _ask(kernel, request)
    if refusal is None:
        return []
    usual = KernelRequest(4096, 4096, 4, 8, False, 128, request.dtype)
    if _ask(kernel, usual) is not None:
        return [refusal]
    asked = [_ask(kernel, variant) for variant in _one_axis_each(request, usual)]
    # The refusal of the whole comes last: it repeats one of the others unless rules interact.
    return list(dict.fromkeys(reason for reason in (*asked, refusal) if reason is not None))


def _one_axis_each(request: KernelRequest, usual: KernelRequest) -> Iterator[KernelRequest]:
    yield replace(usual, bits=request.bits, bias=request.bias, zero_points=request.zero_points)
    if request.group_size > 0:
        yield replace(usual, k=4096 * request.group_size, group_size=request.group_size)
    yield replace(usual, k=request.k, group_size=-1)
    yield replace(usual, n=request.n)


def _ask(kernel: Any, request: KernelRequest) -> str | None:
    try:
        answer = kernel.can_implement(mixed_precision_config(request))
    except Exception as error:  # a check that fails is a refusal, not the end of the selection
        return f"its can_implement failed with {type(error).__name__}: {error}"
    able, reason = answer if isinstance(answer, tuple) else (answer, None)
    return None if able else str(reason or "no reason given")


def quantises_activations(platform: Platform, dtype: str) -> str | None:
    """Why vLLM's CPU kernel would silently run W4A8 instead of W4A16, or None."""
    from vllm import envs

    risky = "amx" in platform.features or platform.machine.startswith("riscv")
    if dtype == "bfloat16" and risky and getattr(envs, "VLLM_CPU_INT4_W4A8", False):
        return (
            "vLLM would quantise the activations to 8 bits on this CPU "
            "(set VLLM_CPU_INT4_W4A8=0 to run the exact kernel)"
        )
    return None


def missing_cpu_op(name: str, platform: Platform) -> str | None:
    """Why ``torch.ops._C.<name>`` does not exist on ``platform``, or None.

    vLLM ships one library for each tier of x86 instruction sets and they do not hold the same
    operators. The one this process loads is asked; the others are searched for the name.
    """
    op = f"_C::{name}"
    if op in platform.ops:
        return None
    if op in dict(platform.missing):
        return platform.why_missing(op)
    if platform.machine != _host.machine():
        return f"the vLLM installed here is for {_host.machine()}, not {platform.machine}"
    import vllm
    from vllm import _custom_ops  # noqa: F401  # it loads the library of this machine

    library = _library(platform.machine, platform.features)
    if library == _library(_host.machine(), _features_as_vllm_asks()):
        present = hasattr(torch.ops._C, name)
    else:
        path = Path(str(vllm.__file__)).parent / f"{library}.abi3.so"
        present = path.is_file() and _mentions(path, f"{name}(".encode())
    if present:
        return None
    return f"{library}, the library vLLM loads on {platform.name}, has no operator {name}"


def _library(machine: str, features: frozenset[str]) -> str:
    if machine not in ("x86_64", "AMD64") or "avx512_bf16" in features:
        return "_C"
    return "_C_AVX512" if "avx512" in features else "_C_AVX2"


def _features_as_vllm_asks() -> frozenset[str]:
    probes = {
        "avx512": torch.cpu._is_avx512_supported,
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
    }
    return frozenset(name for name, probe in probes.items() if probe())


@cache
def _mentions(path: Path, text: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(text) >= 0


@cache
def _parameter_class() -> type:
    from vllm.model_executor.parameter import BasevLLMParameter

    class RepackedParameter(BasevLLMParameter):  # type: ignore[misc,unused-ignore]
        """vLLM's parameter class as its kernels see it; nothing is ever loaded into it.

        The base class asks for the tensor-parallel group, which preparation must not need.
        """

        def __init__(self, data: torch.Tensor, **attributes: int | None) -> None:
            self._weight_loader = None
            self.tp_rank, self.tp_size = 0, 1
            for name, value in attributes.items():
                setattr(self, name, value)

    return RepackedParameter


def repack(
    kernel: Any, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.nn.Module:
    """Run vLLM's repacking and return the layer it was done on.

    codes: int32 [N, K·bits/32], packed along K. scale: [N, G] of the activations' dtype. zero:
    int32 [N·bits/32, G], packed along N. That is compressed-tensors' layout.
    """
    factor = 32 // int(kernel.config.weight_type.size_bits)
    layer = checkpoint_layer(codes, scale, zero, factor)
    kernel.process_weights_after_loading(layer)
    return layer


def checkpoint_layer(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, factor: int
) -> torch.nn.Module:
    """A layer with the parameters of vLLM's compressed-tensors method, as ``repack`` takes them;
    ``factor``: codes in a container."""
    make = _parameter_class()
    layer = torch.nn.Module()
    layer.register_parameter(
        CODES, make(codes, input_dim=1, output_dim=0, packed_dim=1, packed_factor=factor)
    )
    layer.register_parameter(SCALE, make(scale, input_dim=1, output_dim=0))
    if zero is not None:
        layer.register_parameter(
            ZERO, make(zero, input_dim=1, output_dim=0, packed_dim=0, packed_factor=factor)
        )
    layer.register_parameter("bias", None)
    return layer


def build(name: str, device: str, request: KernelRequest) -> Any:
    """An instance of vLLM's kernel class ``name``. ``ValueError`` if vLLM has none of that name or
    it declines ``request`` (its own constructor asserts a tuple, which is always true)."""
    found = [kernel for kernel in kernel_classes(device) if kernel.__name__ == name]
    if not found:
        raise ValueError(f"this vLLM has no kernel class {name} for {device}")
    reasons = class_reasons(found[0], request)
    if reasons:
        raise ValueError(f"{name} cannot run {request}: {'; '.join(reasons)}")
    return found[0](
        mixed_precision_config(request),
        w_q_param_name=CODES,
        w_s_param_name=SCALE,
        w_zp_param_name=ZERO,
    )


def repacked_tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The plain tensors that repacking left on the layer, by name."""
    return {name: parameter.data for name, parameter in layer.named_parameters()}


@lru_cache(maxsize=256)
def ready(name: str, device: str, request: KernelRequest) -> tuple[Any, Mapping[str, Any]]:
    """A kernel object whose ``apply_weights`` can be called, and the attributes, tensors apart,
    that its repacking sets on a layer. Both are rebuilt by repacking a weight of the least size.
    """
    kernel = build(name, device, request)
    least = 32
    layer = repack(
        kernel,
        torch.zeros(least, least * request.bits // 32, dtype=torch.int32),
        torch.ones(least, 1, dtype=torch.float32).to(torch_dtype(request.dtype)),
        torch.zeros(least * request.bits // 32, 1, dtype=torch.int32)
        if request.zero_points
        else None,
    )
    unset = set(vars(torch.nn.Module()))
    return kernel, {k: v for k, v in vars(layer).items() if k not in unset}


def apply(
    name: str,
    device: str,
    request: KernelRequest,
    tensors: Mapping[str, torch.Tensor | None],
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """vLLM's ``apply_weights`` on a layer put together from ``tensors``."""
    kernel, attributes = ready(name, device, request)
    return kernel.apply_weights(SimpleNamespace(**{**attributes, **tensors}), x, bias)
