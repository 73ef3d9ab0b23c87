# SPDX-License-Identifier: Apache-2.0
"""What the layers of the small checkpoints compute, in numpy, from their files; imports nothing of
the package. Sources of what is done to x: ``float_definitions`` and ``integer_definitions``.

How a weight [N, K] lies in a file, by tool:

* compressed-tensors ``compressors/pack_quantized``: b-bit codes, 2^(b−1) added, form one bit stream
  along K in int32, low bits first; scales for N, K / G
* compressed-tensors ``compressors/nvfp4``, ``mxfp4``: the even channel is in the low half of a
  byte; fp8 scales are divided by ``weight_global_scale``, E8M0 ones are bytes
* ModelOpt ``export/quant_utils.py``: NVFP4 likewise with the factor ``weight_scale_2``; int4 with
  two output channels in a byte; ``pre_quant_scale`` is multiplied with x
* Quark ``export/nn/modules/realquantizer.py``: int4 in int32 along K in the order 0 2 4 6 1 3 5 7,
  times ``weight_scale_2`` [N], times ``weight_scale``; fp6 as one stream of bits, low ones first
* DeepSeek-V3 ``inference/kernel.py``: ``weight_scale_inv`` is a factor of a block
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from tests.support import float_definitions as floats
from tests.support import integer_definitions as integers
from tests.support.float_definitions import Floats, Single

Tensors = dict[str, npt.NDArray[np.generic]]
"""Tensors of a module by the last component of their names: floats of 8 bits as bytes, bf16 as
fp32, all others as they are."""
Weight = Callable[[Tensors], Floats]
Input = Callable[[Single, Tensors], Floats]


@dataclass(frozen=True)
class Definition:
    """``weight``: tensors → float64 [N, K]; ``x``: x [M, K] and tensors → x̂, as vLLM computes it;
    ``makers``: as the maker's library does in the reference, where that is another function."""

    weight: Weight
    x: Input
    makers: Input | None = None


def modules_of(path: Path) -> dict[str, Tensors]:
    """The tensors of every projection of the checkpoint in a directory, by module."""
    found: dict[str, Tensors] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        module, _, last = name.rpartition(".")
        if not module.endswith("_proj"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = tensor.view(torch.uint8)
        elif tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        found.setdefault(module, {})[last] = tensor.numpy()
    return found


def _number(tensors: Tensors, name: str) -> float:
    return float(tensors[name].reshape(()).astype(np.float32))


def _wide(tensors: Tensors, name: str) -> Floats:
    result: Floats = tensors[name].astype(np.float64)
    return result


def integers_of(tensors: Tensors) -> Floats:
    """int8 [N, K] times scales [N, K / G], [N, 1], [1] or []."""
    codes, scale = _wide(tensors, "weight"), _wide(tensors, "weight_scale")
    if scale.ndim < 2:
        return codes * scale
    return codes * np.repeat(scale, codes.shape[1] // scale.shape[1], 1)


def float8_of(
    tensors: Tensors, scale: str = "weight_scale", block: tuple[int, int] | None = None
) -> Floats:
    values: Floats = floats.E4M3[tensors["weight"].astype(np.int64)]
    factors = _wide(tensors, scale)
    if block is not None:
        factors = floats.spread(factors, values.shape[0], block, values.shape[1])
    return values * factors


def fp4_of(tensors: Tensors, codes: str = "weight_packed") -> Floats:
    result: Floats = floats.E2M1[floats.low_nibbles_first(tensors[codes].astype(np.uint8))]
    return result


def mxfp4_of(tensors: Tensors) -> Floats:
    return fp4_of(tensors) * np.repeat(floats.E8M0[tensors["weight_scale"].astype(int)], 32, 1)


def mxfp8_of(tensors: Tensors) -> Floats:
    wide = np.repeat(floats.E8M0[tensors["weight_scale"].astype(int)], 32, 1)
    return floats.E4M3[tensors["weight"].astype(int)] * wide


def mxfp6_of(tensors: Tensors) -> Floats:
    packed = tensors["weight"].astype(np.uint8)
    bits = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), -1, 6)
    codes = (bits.astype(int) << np.arange(6)).sum(2)
    return floats.E3M2[codes] * np.repeat(floats.E8M0[tensors["weight_scale"].astype(int)], 32, 1)


def _fp8_scales(tensors: Tensors) -> Floats:
    return np.repeat(floats.E4M3[tensors["weight_scale"].astype(int)], 16, 1)


def nvfp4_divided(tensors: Tensors) -> Floats:
    outer = float(np.float32(1) / np.float32(_number(tensors, "weight_global_scale")))
    return fp4_of(tensors) * _fp8_scales(tensors) * outer


def nvfp4_times(tensors: Tensors) -> Floats:
    return fp4_of(tensors, "weight") * _fp8_scales(tensors) * _number(tensors, "weight_scale_2")


def modelopt_int4_of(tensors: Tensors) -> Floats:
    packed = tensors["weight"].astype(np.int64)
    codes = np.empty((packed.shape[0] * 2, packed.shape[1]), dtype=np.int64)
    codes[0::2], codes[1::2] = packed & 15, packed >> 4
    scale = _wide(tensors, "weight_scale")
    wide = np.repeat(scale, codes.shape[1] // scale.shape[1], 1)
    result: Floats = np.where(codes > 7, codes - 16, codes) * wide
    return result


def quark_int4_of(tensors: Tensors) -> Floats:
    words = tensors["weight"].view(np.uint32)
    codes = np.empty((words.shape[0], words.shape[1], 8), dtype=np.int64)
    for slot, channel in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        codes[:, :, channel] = (words >> np.uint32(4 * slot)) & 15
    flat = codes.reshape(words.shape[0], -1)
    signed = np.where(flat > 7, flat - 16, flat)
    return signed * _wide(tensors, "weight_scale_2")[:, None] * _number(tensors, "weight_scale")


def packed_of(tensors: Tensors) -> Floats:
    n, k = (int(length) for length in tensors["weight_shape"])
    words = np.ascontiguousarray(tensors["weight_packed"])
    bits = 32 * words.shape[1] // k

    def unpacked(values: npt.NDArray[np.generic], length: int) -> npt.NDArray[np.int64]:
        stream = np.unpackbits(values.view(np.uint8), axis=1, bitorder="little")
        fields = stream[:, : length * bits].reshape(len(values), length, bits)
        result: npt.NDArray[np.int64] = (fields.astype(np.int64) << np.arange(bits)).sum(2)
        return result

    scale = _wide(tensors, "weight_scale")
    zero: npt.NDArray[np.int64] | int = 1 << (bits - 1)
    if "weight_zero_point" in tensors:
        points = np.ascontiguousarray(tensors["weight_zero_point"].T)
        zero = np.repeat(unpacked(points, n).T, k // scale.shape[1], 1)
    codes: Floats = (unpacked(words, k) - zero).astype(np.float64)
    return codes * np.repeat(scale, k // scale.shape[1], 1)


def packed_or_float8_of(tensors: Tensors) -> Floats:
    return packed_of(tensors) if "weight_packed" in tensors else float8_of(tensors)


def float8_if_float8(x: Single, tensors: Tensors) -> Floats:
    return x.astype(np.float64) if "weight_packed" in tensors else floats.per_token(x)


def prescaled(x: Single, tensors: Tensors) -> Floats:
    if "pre_quant_scale" in tensors:
        x = x * tensors["pre_quant_scale"].astype(np.float32)
    return floats.static(x, _number(tensors, "input_scale"))


def int8_static(x: Single, tensors: Tensors) -> Floats:
    zero = int(tensors["input_zero_point"].reshape(()).astype(int))
    return integers.int8_static(x, _number(tensors, "input_scale"), zero)


def float8_static(x: Single, tensors: Tensors) -> Floats:
    return floats.static(x, _number(tensors, "input_scale"))


def int8_by_127_and_a_half(x: Single, tensors: Tensors) -> Floats:
    """compressed-tensors ``quantization/utils/helpers.py``, ``calculate_qparams``: the scale is
    max|x| / (255 / 2)."""
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127.5)
    safe = np.where(scale == 0, np.float32(1), scale)
    result: Floats = np.clip(np.rint(x / safe), -128, 127).astype(np.float64) * scale
    return result


def float8_of_all_tokens(x: Single, tensors: Tensors) -> Floats:
    """Quark ``PerTensorMinMaxObserver``: one scale for all tokens of a call."""
    return floats.per_token(x.reshape(1, -1)).reshape(x.shape)


def float8_of_token(x: Single, tensors: Tensors) -> Floats:
    return floats.per_token(x)


def float8_of_128(x: Single, tensors: Tensors) -> Floats:
    return floats.per_token(x, group=128)


def symmetric(x: Single, tensors: Tensors) -> Floats:
    return integers.int8_per_token(x)


BLOCKS = (128, 128)
DEFINITIONS: dict[str, Definition] = {
    "autoround-native-mxfp4": Definition(mxfp4_of, lambda x, _: integers.mxfp4(x)),
    "llmcompressor-fp8-block": Definition(lambda t: float8_of(t, block=BLOCKS), float8_of_128),
    "llmcompressor-fp8-dynamic": Definition(float8_of, float8_of_token),
    "llmcompressor-fp8-static": Definition(float8_of, float8_static),
    "llmcompressor-mixed-qv-differ": Definition(packed_or_float8_of, float8_if_float8),
    "llmcompressor-mxfp4": Definition(mxfp4_of, lambda x, _: integers.mxfp4(x)),
    "llmcompressor-mxfp8": Definition(mxfp8_of, lambda x, _: floats.mx8(x)),
    "llmcompressor-nvfp4": Definition(
        nvfp4_divided,
        lambda x, t: floats.nvfp4(
            x, float(np.float32(1) / np.float32(_number(t, "input_global_scale")))
        ),
    ),
    "llmcompressor-w4a8-int": Definition(integers_of, symmetric, int8_by_127_and_a_half),
    "llmcompressor-w8a8-int8-dyn": Definition(integers_of, symmetric, int8_by_127_and_a_half),
    "llmcompressor-w8a8-int8-dyn-asym": Definition(
        integers_of, lambda x, _: integers.int8_per_token(x, symmetric=False)
    ),
    "llmcompressor-w8a8-int8-static-asym": Definition(integers_of, int8_static),
    "modelopt-nvfp4": Definition(
        nvfp4_times, lambda x, t: floats.nvfp4(x, _number(t, "input_scale"))
    ),
    "modelopt-w4a8-awq": Definition(modelopt_int4_of, prescaled),
    "own-fp8-block128": Definition(
        lambda t: float8_of(t, "weight_scale_inv", BLOCKS), float8_of_128
    ),
    "own-fp8-static": Definition(float8_of, float8_static),
    "quark-int4_fp8": Definition(quark_int4_of, float8_of_token, float8_of_all_tokens),
    "quark-int8": Definition(integers_of, int8_static),
    "quark-mxfp6_e3m2": Definition(mxfp6_of, lambda x, _: integers.mx(x, floats.E3M2, 2, 4)),
}
"""Every small checkpoint of our formats that quantizes inputs."""
