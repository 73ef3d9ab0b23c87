# SPDX-License-Identifier: Apache-2.0
"""Tensors of one quantized linear weight as each tool writes them, and what they mean.

A writer maps a weight, fp32 [N, K], to its tensors by the last part of their names and to the
dequantized weight. ``x`` is how vLLM quantizes the layer's input when it runs, if it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.hub import codes as c

Tensors = dict[str, torch.Tensor]
Written = tuple[Tensors, torch.Tensor]
Quantize = Callable[[torch.Tensor], torch.Tensor]

INPUT_RANGE = 8.0
"""Largest |x| that static scales of inputs expect."""


@dataclass(frozen=True)
class Writer:
    """How one weight is written; ``x``, ``y``: None if its input, or output, is not quantized.
    ``takes``: whether the tool would quantize a weight [N, K]."""

    write: Callable[[torch.Tensor], Written]
    x: Quantize | None = None
    y: Quantize | None = None
    takes: Callable[[int, int], bool] = lambda n, k: True


def scalar(value: float, weight: torch.Tensor, shape: tuple[int, ...] = ()) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.float32, device=weight.device)


# Inputs, by what vLLM computes.


def x_fp8(scale: Callable[[torch.Tensor], torch.Tensor]) -> Quantize:
    def quantized(x: torch.Tensor) -> torch.Tensor:
        s = c.nonzero(scale(x.float()))
        return (c.to_e4m3(x.float() / s).float() * s).to(x.dtype)

    return quantized


def per_token(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(-1, keepdim=True) / c.E4M3_MAX


def per_group(size: int, *, powers_of_two: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    def scale(x: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
        s = padded.abs().unflatten(-1, (-1, size)).amax(-1) / c.E4M3_MAX
        if powers_of_two:
            s = torch.exp2(torch.ceil(torch.log2(c.nonzero(s))))
        return s.repeat_interleave(size, -1)[..., : x.shape[-1]]

    return scale


def static(x: torch.Tensor) -> torch.Tensor:
    return torch.full((), INPUT_RANGE / c.E4M3_MAX, device=x.device)


def x_int8_per_token(x: torch.Tensor) -> torch.Tensor:
    s = c.nonzero(x.float().abs().amax(-1, keepdim=True) / 127)
    return ((x.float() / s).round().clamp(-128, 127) * s).to(x.dtype)


def static_int8(x: torch.Tensor) -> torch.Tensor:
    s = INPUT_RANGE / 127
    return ((x.float() / s).round().clamp(-128, 127) * s).to(x.dtype)


STATIC_INT8 = {name: torch.tensor([INPUT_RANGE / 127]) for name in ("input_scale", "output_scale")}


def x_nvfp4(x: torch.Tensor) -> torch.Tensor:
    if x.shape[-1] % 16:
        return x  # of a layer that is not quantized
    second = INPUT_RANGE / (c.E2M1_MAX * c.E4M3_MAX)
    grouped = x.float().unflatten(-1, (-1, 16))
    s = c.to_e4m3(grouped.abs().amax(-1, keepdim=True) / c.E2M1_MAX / second).float() * second
    return (c.e2m1_values(c.e2m1_codes(grouped / c.nonzero(s))) * s).flatten(-2).to(x.dtype)


def x_mxfp4(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of a group is rounded to one bit of mantissa before its exponent is
    taken, as vLLM does for MXFP4 of Quark ("even") and of compressed-tensors."""
    if x.shape[-1] % 32:
        return x
    grouped = x.float().unflatten(-1, (-1, 32))
    bits = grouped.abs().amax(-1, keepdim=True).view(torch.int32)
    largest = ((bits + 0x200000) & 0x7F800000).view(torch.float32)
    s = c.e8m0_values(c.e8m0_exponents(largest, 2))
    return (c.e2m1_values(c.e2m1_codes(grouped / s)) * s).flatten(-2).to(x.dtype)


# Weights.


def fp8_block(rows: int, columns: int, name: str, *, powers_of_two: bool = False) -> Any:
    def write(weight: torch.Tensor) -> Written:
        scale = c.nonzero(c.blocks(weight, rows, columns) / c.E4M3_MAX)
        if powers_of_two:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        each = c.spread(scale, rows, columns, weight.shape)
        codes = c.to_e4m3(weight / each)
        return {"weight": codes, name: scale}, codes.float() * each

    return write


def fp8(*, per_channel: bool = False, input_scale: bool = False) -> Any:
    def write(weight: torch.Tensor) -> Written:
        largest = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().amax()
        scale = c.nonzero(largest / c.E4M3_MAX)
        codes = c.to_e4m3(weight / scale)
        tensors = {"weight": codes, "weight_scale": scale}
        if input_scale:
            tensors["input_scale"] = scalar(INPUT_RANGE / c.E4M3_MAX, weight)
        return tensors, codes.float() * scale

    return write


def nvfp4(*, of_modelopt: bool, inputs: bool = True) -> Any:
    def write(weight: torch.Tensor) -> Written:
        second = c.nonzero(weight.abs().amax() / (c.E2M1_MAX * c.E4M3_MAX))
        scale = c.to_e4m3((c.blocks(weight, 1, 16) / c.E2M1_MAX / second).clamp(min=2.0**-9))
        each = c.spread(scale.float() * second, 1, 16, weight.shape)
        codes = c.e2m1_codes(weight / each)
        value = c.e2m1_values(codes) * c.spread(scale.float(), 1, 16, weight.shape)
        x_second = INPUT_RANGE / (c.E2M1_MAX * c.E4M3_MAX)
        if of_modelopt:
            tensors = {"weight": c.nibbles(codes), "weight_scale": scale, "weight_scale_2": second}
            if inputs:
                tensors["input_scale"] = scalar(x_second, weight)
            return tensors, value * second
        divisor = (1 / second).reshape(1)
        tensors = {
            "weight_packed": c.nibbles(codes),
            "weight_scale": scale,
            "weight_global_scale": divisor,
        }
        if inputs:
            tensors["input_global_scale"] = scalar(1 / x_second, weight, (1,))
        return tensors, value / divisor

    return write


def mxfp4(codes_name: str) -> Any:
    def write(weight: torch.Tensor) -> Written:
        exponents = c.e8m0_exponents(c.blocks(weight, 1, 32), 2)
        each = c.spread(c.e8m0_values(exponents), 1, 32, weight.shape)
        codes = c.e2m1_codes(weight / each)
        tensors = {codes_name: c.nibbles(codes), "weight_scale": exponents}
        return tensors, c.e2m1_values(codes) * each

    return write


def pack_quantized(
    bits: int, group: int, *, symmetric: bool, numbers: Tensors | None = None
) -> Any:
    """compressed-tensors; ``numbers``: further tensors, of static inputs and outputs."""

    def write(weight: torch.Tensor) -> Written:
        codes, scale, zero = c.integers(weight, bits, group, symmetric=symmetric)
        tensors = {
            "weight_packed": c.words(codes, bits, 1),
            "weight_scale": scale,
            "weight_shape": torch.tensor(list(weight.shape), device=weight.device),
        }
        if not symmetric:
            tensors["weight_zero_point"] = c.words(zero, bits, 0)
        return tensors | (numbers or {}), c.meaning(codes, scale, zero, group)

    return write


def int8_channel(numbers: Tensors | None = None) -> Any:
    """compressed-tensors; ``numbers`` as in ``pack_quantized``."""

    def write(weight: torch.Tensor) -> Written:
        codes, scale, zero = c.integers(weight, 8, -1, symmetric=True)
        signed = (codes.to(torch.int16) - 128).to(torch.int8)
        tensors = {"weight": signed, "weight_scale": scale, **(numbers or {})}
        return tensors, c.meaning(codes, scale, zero, -1)

    return write


def gptq(bits: int, group: int, *, version_2: bool = False) -> Any:
    def write(weight: torch.Tensor) -> Written:
        codes, scale, zero = c.integers(weight, bits, group, symmetric=True)
        stored = zero if version_2 else zero - 1
        k = weight.shape[1]
        size = k if group == -1 else group
        tensors = {
            "qweight": c.words(codes.t(), bits, 0),
            "qzeros": c.words(stored.t(), bits, 1),
            "scales": scale.t().contiguous(),
            "g_idx": torch.arange(k, dtype=torch.int32, device=weight.device) // size,
        }
        return tensors, c.meaning(codes, scale, zero, group)

    return write


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq_words(codes: torch.Tensor) -> torch.Tensor:
    """int32 [..., N/8], nibble i of a word holding element ``AWQ_ORDER[i]`` of its eight."""
    return c.words(codes.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2), 4, -1)


def awq(group: int) -> Any:
    def write(weight: torch.Tensor) -> Written:
        codes, scale, zero = c.integers(weight, 4, group, symmetric=False)
        tensors = {
            "qweight": awq_words(codes.t()),
            "qzeros": awq_words(zero.t()),
            "scales": scale.t().contiguous(),
        }
        return tensors, c.meaning(codes, scale, zero, group)

    return write


def quark_int4(group: int) -> Any:
    """Symmetric, two's complement, in AWQ's order (``pack_method: reorder``)."""

    def write(weight: torch.Tensor) -> Written:
        codes, scale, zero = c.integers(weight, 4, group, symmetric=True)
        tensors = {"weight": awq_words((codes ^ 8).t()), "weight_scale": scale.t().contiguous()}
        return tensors, c.meaning(codes, scale, zero, group)

    return write
