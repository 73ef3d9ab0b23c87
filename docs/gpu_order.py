# SPDX-License-Identifier: Apache-2.0
"""The table of ``gpu.md`` with the order of backends for each weight and GPU.

The order is that of ``registry.rank`` for layers of 4096×4096 with bf16 activations."""

from __future__ import annotations

from collections.abc import Mapping

from vllm.compressed_linear.backends import registry
from vllm.compressed_linear.machine.gpus import GPUS
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    ChannelOrder,
    CompressedLinearDescriptor,
    ScaleSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import BF16, E2M1, E4M3, INT8, NF4, ElementType, uint
from vllm.compressed_linear.testing.suite import NVFP4_INPUT, mx

SIZE = 4096
INTEGER = ZeroSpec("integer", "uint8")


def _weight(
    element: ElementType,
    group: int = 128,
    scale: str = "bfloat16",
    zero: ZeroSpec | None = None,
    row_scale: str | None = None,
) -> WeightSpec:
    spec = ScaleSpec(scale, "channel" if group == -1 else "group", group)
    return WeightSpec(element, spec, zero, row_scale)


WEIGHTS: Mapping[str, tuple[WeightSpec, dict[str, object]]] = {
    "not quantized": (WeightSpec(BF16), {}),
    "4 bits, groups of 128": (_weight(uint(4, 8)), {}),
    "the same with activation order": (
        _weight(uint(4, 8)),
        {"channel_order": ChannelOrder(SIZE)},
    ),
    "4 bits, zero points": (_weight(uint(4), zero=INTEGER), {}),
    "8 bits, groups of 128": (_weight(uint(8, 128)), {}),
    "8 bits, zero points": (_weight(uint(8), zero=INTEGER), {}),
    "3 bits": (_weight(uint(3, 4)), {}),
    "nf4, groups of 64": (_weight(NF4, 64, "float32"), {}),
    "e4m3, a scale per channel": (_weight(E4M3, -1, "float32"), {}),
    "NVFP4": (_weight(E2M1, 16, "float8_e4m3fn", row_scale="float32"), {}),
    "MXFP4": (_weight(E2M1, 32, "e8m0"), {}),
    "int8, x as int8 per token": (
        _weight(uint(8, 128), -1, "float32"),
        {"activation": ActivationSpec(INT8, True, "token")},
    ),
    "e4m3, x as e4m3 per token": (
        _weight(E4M3, -1, "float32"),
        {"activation": ActivationSpec(E4M3, True, "token", maximum=448.0)},
    ),
    "e4m3 in blocks of 128×128, x as e4m3 in groups of 128": (
        WeightSpec(E4M3, ScaleSpec("float32", "block", 128, 128)),
        {"activation": ActivationSpec(E4M3, True, "group", group_size=128, maximum=448.0)},
    ),
    "NVFP4, x as NVFP4": (
        _weight(E2M1, 16, "float8_e4m3fn", row_scale="float32"),
        {"activation": NVFP4_INPUT},
    ),
    "MXFP4, x as MXFP4": (_weight(E2M1, 32, "e8m0"), {"activation": mx(E2M1, 4.0)}),
}


def rows() -> list[list[str]]:
    """Weight, compute capabilities, backends from the first to the last; neighbours that agree are
    one row."""
    out: list[list[str]] = []
    for name, (weight, more) in WEIGHTS.items():
        layer = CompressedLinearDescriptor(SIZE, SIZE, weight, "bfloat16", "bfloat16", **more)  # type: ignore[arg-type]
        groups: dict[str, list[int]] = {}
        for capability in GPUS:
            groups.setdefault(_order(layer, capability), []).append(capability)
        for order, capabilities in groups.items():
            out.append([name, _capabilities(capabilities), order])
            name = ""
    return out


def _order(layer: CompressedLinearDescriptor, capability: int) -> str:
    able = (c for c in registry.rank(layer, Platform.parse(f"cuda:{capability}")) if c.verdict)
    return ", ".join(
        c.variant if c.name == "vllm_native" else f"`{c.name}`"
        for c in able
        if c.name != registry.REFERENCE
    )


def _capabilities(found: list[int]) -> str:
    return "all" if found == list(GPUS) else ", ".join(f"{c / 10:.1f}" for c in found)
