# SPDX-License-Identifier: Apache-2.0
"""What vLLM's own kernel classes for CPUs decline, and machines and vLLMs that are not here."""

from __future__ import annotations

import dataclasses
import importlib
import platform as host
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.support.cpu_wna16 import HERE, needs_kernel, part_of, reasons, values
from tests.support.messages import saying, says
from vllm.compressed_linear.backends import vllm_native
from vllm.compressed_linear.backends.vllm_native import VllmNativeBackend
from vllm.compressed_linear.backends.vllm_native.classes import mixed_precision, tables
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    ChannelOrder,
    CompressedLinearDescriptor,
    ScaleSpec,
    TransformSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import BF16, E2M1, ElementType, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

pytestmark = pytest.mark.usefixtures("fresh_answers")


# --- refusals ------------------------------------------------------------------------------------


def descriptor(
    n: int = 64,
    k: int = 128,
    element: ElementType = uint(4, 8),  # noqa: B008  # frozen
    scale: ScaleSpec | None = ScaleSpec("bfloat16", "group", 32),  # noqa: B008  # frozen
    zero: ZeroSpec | None = None,
    dtype: str = "bfloat16",
    **fields: Any,
) -> CompressedLinearDescriptor:
    weight = WeightSpec(element, scale, zero, fields.pop("row_scale", None))
    fields.setdefault("output_dtype", dtype)
    return CompressedLinearDescriptor(k, n, weight, dtype, **fields)


@needs_kernel
@pytest.mark.parametrize(
    ("declined", "expected"),
    [
        (descriptor(n=40), ["CPUWNA16LinearKernel: Output size (40)"]),
        (descriptor(k=144, scale=ScaleSpec("bfloat16", "group", 16)), ["Input size (144)"]),
        (
            descriptor(k=96, scale=ScaleSpec("bfloat16", "group", 3)),
            ["CPUWNA16LinearKernel: Group size (3)"],
        ),
        (
            descriptor(element=uint(8, 128)),
            [
                "8-bit integer weights (supported bits: 4)",
                "CPUWNA16LinearKernel: Quant type (uint8b128)",
                "Dynamic4bitLinearKernel: Unsupported quant type uint8b128",
                "ZentorchWNA16LinearKernel:",
            ],
        ),
        (descriptor(element=uint(3, 4)), ["3-bit integer weights", "Quant type (uint3b4)"]),
        (descriptor(element=E2M1), ["e2m1 weights (supported: uint4)"]),
        (
            descriptor(element=uint(4), zero=ZeroSpec("float", "float16")),
            ["float zero points (supported: integer)"],
        ),
        (descriptor(zero=ZeroSpec("integer", "uint8")), ["zero points on top of a bias of 8"]),
        (descriptor(element=uint(4, 16)), ["bias 16 (supported: 0 to 15)"]),
        (descriptor(scale=None), ["weights without scales"]),
        (descriptor(element=BF16, scale=None), ["bf16 weights (supported: uint4)"]),
        (descriptor(scale=ScaleSpec("float8_e4m3fn", "group", 32)), ["scale dtype float8_e4m3fn"]),
        (descriptor(dtype="float32"), ["input dtype float32 (supported: bfloat16, float16)"]),
        (descriptor(dtype="float16"), ["scale dtype bfloat16 with float16 activations"]),
        (descriptor(output_dtype="float32"), ["output dtype float32"]),
        (descriptor(bias_dtype="float32"), ["bias dtype float32"]),
        (descriptor(row_scale="float32"), ["second-level scales"]),
        (descriptor(prescale="float16"), ["a per-channel scale of the activations"]),
        (descriptor(transform=TransformSpec("hadamard", "input", 32)), ["Hadamard"]),
        (
            descriptor(activation=ActivationSpec(uint(8, 128), True, "token")),
            ["activations as int8 dynamic per token (supported: none)"],
        ),
        (descriptor(n=0), ["an empty weight (0x128)"]),
        (
            descriptor(
                channel_order=ChannelOrder(144, padded=True),
                k=128,
                scale=ScaleSpec("bfloat16", "group", 16),
            ),
            ["Input size (144)"],
        ),
        (
            descriptor(
                n=40,
                k=84,
                element=uint(8, 128),
                scale=ScaleSpec("float8_e4m3fn", "group", 21),
                zero=ZeroSpec("float", "float16"),
                dtype="float32",
                output_dtype="bfloat16",
                bias_dtype="float16",
            ),
            [
                "8-bit integer weights",
                "input dtype float32",
                "scale dtype float8_e4m3fn",
                "float zero points",
                "output dtype bfloat16",
                "bias dtype float16",
                "zero points on top of a bias of 128",
                "Quant type",
                "Group size (21)",
                "Input size (84)",
                "Output size (40)",
            ],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, CompressedLinearDescriptor) else "",
)
def test_every_reason_is_given(declined: CompressedLinearDescriptor, expected: list[str]) -> None:
    text = reasons(declined)
    for reason in expected:
        assert reason in text
    if len(expected) == 1:
        own = [
            line
            for line in text.splitlines()
            # What the other classes say of the same descriptor is listed too.
            if not line.startswith(("Dynamic4bit", "Zentorch"))
        ]
        assert len(own) == 1, own


@needs_kernel
def test_a_declined_descriptor_is_not_prepared_either() -> None:
    """vLLM's constructor asserts a tuple, which is always true; ours asks."""
    request = mixed_precision.KernelRequest(100, 64, 4, 8, False, -1, "bfloat16")
    kernel = tables.kernel_class("mixed precision", "cpu", vllm_native.CPU_KERNEL)
    with pytest.raises(ValueError, match=r"Input size \(100\)"):
        mixed_precision.build(kernel, request)
    with pytest.raises(ValueError, match=saying("Nothing")):
        tables.kernel_class("mixed precision", "cpu", "Nothing")


@needs_kernel
def test_a_scale_that_float16_weights_cannot_have_is_refused() -> None:
    plain = values(scale_dtype="float16")
    plain.scale[3, 2] = 5000.0
    part = part_of("awq", plain, "float16")
    with pytest.raises(ValueError, match=saying("scale", 5000, 0, 63)):
        VllmNativeBackend(part.descriptor).prep_weights_for_execution(part.weights)


@needs_kernel
def test_a_zero_point_that_does_not_fit_is_refused() -> None:
    plain = values(zero=True)
    assert plain.zero is not None
    plain.zero[5, 1] = 16
    scheme = (
        StoredTensor("c", Role.CODES, "uint8", ("N", "K"), Packing(8, "K", "uint8")),
        StoredTensor("s", Role.SCALE, "float32", ("N", "G")),
        StoredTensor("z", Role.ZERO, "uint8", ("N", "G")),
    )
    weight = WeightSpec(uint(4), ScaleSpec("float32", "group", 32), ZeroSpec("integer", "uint8"))
    source = ShardSource("layer", CheckpointScheme(weight, scheme), 64, 128, 0, 64, 0, 128)
    tensors = {"c": plain.codes, "s": plain.scale, "z": plain.zero}
    (part,) = refine([LoadedShard(source, tensors)], LayerContext("bfloat16", "bfloat16"))
    with pytest.raises(ValueError, match=saying("zero point", 16, 0, 63)):
        VllmNativeBackend(part.descriptor).prep_weights_for_execution(part.weights)


# --- machines and vLLMs that are not here --------------------------------------------------------


def test_the_operator_is_looked_for_in_the_library_of_the_platform() -> None:
    if host.machine() != "x86_64":
        pytest.skip("the tiers are those of x86")
    assert "_C_AVX2, the library vLLM loads on cpu:avx2, has no operator cpu_gemm_wna16" in reasons(
        descriptor(), Platform.parse("cpu:avx2")
    )
    assert VllmNativeBackend.can_implement(descriptor(), Platform.parse("cpu:avx512"))
    assert VllmNativeBackend.can_implement(descriptor(), Platform.parse("cpu:avx512bf16"))
    avx2 = Platform.parse("cpu:avx2")
    assert VllmNativeBackend.can_implement(
        descriptor(), dataclasses.replace(avx2, ops=avx2.ops | {"_C::cpu_gemm_wna16"})
    )
    told = dataclasses.replace(HERE, missing=(("_C::cpu_gemm_wna16", "not built today"),))
    assert "not built today" in reasons(descriptor(), told)


def test_another_architecture_is_declined() -> None:
    other = "aarch64" if host.machine() == "x86_64" else "x86_64"
    assert "the vLLM installed here is for" in reasons(
        descriptor(), Platform("cpu", other, frozenset())
    )


def test_silent_activation_quantization_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    if host.machine() != "x86_64":
        pytest.skip("AMX is x86")
    amx = Platform.parse("cpu:amx")
    monkeypatch.delenv("VLLM_CPU_INT4_W4A8", raising=False)
    assert says(reasons(descriptor(), amx), "VLLM_CPU_INT4_W4A8=0")
    half = descriptor(dtype="float16", scale=ScaleSpec("float16", "group", 32))
    assert VllmNativeBackend.can_implement(half, amx)
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    assert VllmNativeBackend.can_implement(descriptor(), amx)


@needs_kernel
def test_weights_repacked_for_8_bit_activations_stop_the_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = part_of("gptq", values())
    real = mixed_precision.repack

    def repack(*args: Any) -> torch.nn.Module:
        layer = real(*args)
        layer.use_w4a8 = True  # type: ignore[assignment]
        return layer

    monkeypatch.setattr(mixed_precision, "repack", repack)
    with pytest.raises(RuntimeError, match=saying("8-bit")):
        VllmNativeBackend(part.descriptor).prep_weights_for_execution(part.weights)


@pytest.mark.parametrize("device", ["rocm", "xpu"])
def test_devices_of_others_are_asked_class_by_class(device: str) -> None:
    text = reasons(descriptor(element=uint(8, 128)), Platform.parse(device))
    names = {
        "rocm": ("RDNA3W4A16LinearKernel", "TritonW4A16LinearKernel"),
        "xpu": ("XPUwNa16LinearKernel",),
    }
    for name in names[device]:
        assert f"{name}: " in text


@needs_kernel
def test_vllms_own_switch_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "CPUWNA16LinearKernel")
    assert says(reasons(descriptor()), "CPUWNA16LinearKernel", "VLLM_DISABLED_KERNELS")


_HOME = "vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel"


def test_a_vllm_with_another_interface_is_a_reason_and_no_exception(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = importlib.import_module(_HOME)

    @dataclass
    class Newer:
        full_weight_shape: tuple[int, int]
        quant_key: Mapping[str, str]

    monkeypatch.setattr(home, "MPLinearLayerConfig", Newer)
    tables.unavailable.cache_clear()
    assert says(reasons(descriptor()), "'quant_key'")


def test_a_class_without_our_keywords_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    home = importlib.import_module(_HOME)

    def init(self: Any, config: Any) -> None: ...

    monkeypatch.setattr(home.MPLinearKernel, "__init__", init)
    tables.unavailable.cache_clear()
    assert says(reasons(descriptor()), "'c'")


@needs_kernel
def test_a_check_that_fails_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    def broken(config: Any) -> tuple[bool, str | None]:
        raise KeyError("capability")

    monkeypatch.setattr(CPUWNA16LinearKernel, "can_implement", broken)
    assert says(reasons(descriptor()), "can_implement", "KeyError", "'capability'")


@needs_kernel
def test_a_class_that_accepts_but_is_not_wired_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.zentorch import (
        ZentorchWNA16LinearKernel,
    )

    monkeypatch.setattr(ZentorchWNA16LinearKernel, "can_implement", lambda config: (True, None))
    text = reasons(descriptor(n=40))
    assert says(text, "ZentorchWNA16LinearKernel", "descriptors")
    assert "CPUWNA16LinearKernel: Output size (40)" in text
