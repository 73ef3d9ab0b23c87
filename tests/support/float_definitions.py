# SPDX-License-Identifier: Apache-2.0
"""What float formats mean, in numpy, from their specifications; imports nothing of the package.

* e4m3, e5m2: OCP 8-bit Floating Point Specification 1.0, section 5; e4m3 has no infinity
* e2m1, e8m0: OCP Microscaling Formats Specification 1.0, sections 5.3.3 and 5.4.1
* x in 8 bits: vLLM ``layers/quantization/input_quant_fp8.py`` (scale = max|x| / 448, x / scale,
  clamped, rounded to nearest even); with ``ue8m0`` the scale is 2^ceil(log2) of that (DeepSeek-V3.1
  ``inference/kernel.py``)
* with fbgemm's ``activation_scale_ub``: FBGEMM ``quantize_fp8_per_row``, vLLM ``QuantFP8`` (max|x|
  is at most that)
* x in NVFP4: vLLM ``layers/quantization/utils/nvfp4_emulation_utils.py`` (the scale of 16 channels
  is e4m3(max|x| / 6 / global) · global)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Single = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def _decoded(code: int, exponent: int, mantissa: int, nan: set[int], infinite: set[int]) -> float:
    sign = -1.0 if code >> (exponent + mantissa) else 1.0
    magnitude = code & ((1 << (exponent + mantissa)) - 1)
    if magnitude in nan:
        return float("nan")
    if magnitude in infinite:
        return sign * float("inf")
    field, fraction = divmod(magnitude, 1 << mantissa)
    bias = (1 << (exponent - 1)) - 1
    if field == 0:
        return sign * fraction * 2.0 ** (1 - bias - mantissa)
    return float(sign * (1 + fraction / (1 << mantissa)) * 2.0 ** (field - bias))


E4M3 = np.array([_decoded(c, 4, 3, {0x7F}, set()) for c in range(256)])
E5M2 = np.array([_decoded(c, 5, 2, {0x7D, 0x7E, 0x7F}, {0x7C}) for c in range(256)])
E2M1 = np.array([_decoded(c, 2, 1, set(), set()) for c in range(16)])
E3M2 = np.array([_decoded(c, 3, 2, set(), set()) for c in range(64)])
E8M0 = np.array([2.0 ** (c - 127) for c in range(255)] + [np.nan])


def rounded(values: Floats, table: npt.NDArray[np.float64]) -> Floats:
    """The nearest values of ``table``; ties to even codes, saturating."""
    codes = np.flatnonzero(np.isfinite(table) & ~np.signbit(table))
    levels = table[codes]
    magnitude = np.minimum(np.abs(values), levels[-1])
    above = np.clip(np.searchsorted(levels, magnitude), 1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    nearer = magnitude - low < high - magnitude
    tie = magnitude - low == high - magnitude
    even = codes[above - 1] % 2 == 0
    result: Floats = np.copysign(np.where(nearer | (tie & even), low, high), values)
    return result


def per_token(
    x: npt.NDArray[np.float32], *, group: int = 0, ue8m0: bool = False, limit: float = np.inf
) -> Floats:
    """x [M, K] through e4m3 with a scale for each token, or each ``group`` channels of one.
    ``limit``: of max|x| in the scale."""
    out = np.zeros(x.shape, dtype=np.float64)
    size = group or x.shape[1]
    for start in range(0, x.shape[1], size):
        part = x[:, start : start + size].astype(np.float32)
        largest = np.minimum(np.abs(part).max(1, keepdims=True), np.float32(limit))
        scale = largest / np.float32(448)
        if ue8m0:
            with np.errstate(divide="ignore"):
                scale = np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)
        out[:, start : start + size] = _with_scale(part, scale)
    return out


def static(x: npt.NDArray[np.float32], scale: float) -> Floats:
    """x [M, K] through e4m3 with the scale of the file."""
    return _with_scale(x.astype(np.float32), np.full((1, 1), scale, dtype=np.float32))


def _with_scale(x: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> Floats:
    safe = np.where(scale == 0, np.float32(1), scale)
    result: Floats = rounded((x / safe).astype(np.float64), E4M3) * scale.astype(np.float64)
    return result


def nvfp4(x: npt.NDArray[np.float32], global_scale: float) -> Floats:
    """x [M, K] through e2m1 with e4m3 scales of 16 channels under ``global_scale``."""
    groups = x.astype(np.float32).reshape(x.shape[0], -1, 16)
    largest = np.abs(groups).max(2, keepdims=True) / np.float32(6)
    outer = np.float32(global_scale)
    scale = (rounded((largest / outer).astype(np.float64), E4M3) * outer).astype(np.float32)
    safe = np.where(scale == 0, np.float32(1), scale)
    values = rounded((groups / safe).astype(np.float64), E2M1) * scale.astype(np.float64)
    result: Floats = values.reshape(x.shape)
    return result


def int8(x: npt.NDArray[np.float32], scale: float) -> Floats:
    """x [M, K] through 8-bit integers with the scale of the file."""
    codes = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), -128, 127)
    result: Floats = codes.astype(np.float64) * np.float64(np.float32(scale))
    return result


def mx4(x: npt.NDArray[np.float32]) -> Floats:
    """x [M, K] through e2m1 with the smallest powers of two for 32 channels under which nothing
    saturates (modelopt ``quantization/qtensor/mxfp4_tensor.py``)."""
    groups = x.astype(np.float32).reshape(x.shape[0], -1, 32)
    largest = np.abs(groups).max(2, keepdims=True) / np.float32(6)
    with np.errstate(divide="ignore"):
        scale = np.exp2(np.maximum(np.ceil(np.log2(largest.astype(np.float64))), -127))
    result: Floats = (rounded(groups.astype(np.float64) / scale, E2M1) * scale).reshape(x.shape)
    return result


def mx8(x: npt.NDArray[np.float32]) -> Floats:
    """x [M, K] through e4m3 with the smallest powers of two for 32 channels under which nothing
    saturates (vLLM ``layers/quantization/utils/mxfp8_utils.py``)."""
    return per_token(x, group=32, ue8m0=True)


def spread(scale: Floats, rows: int, block: tuple[int, int], channels: int) -> Floats:
    """Scales of blocks, one for each weight [rows, channels]."""
    wide = np.repeat(np.repeat(scale, block[0], 0), block[1], 1)
    return wide[:rows, :channels]


def low_nibbles_first(packed: Bytes) -> Bytes:
    """Codes [N, K] of bytes [N, K / 2]: an even channel is in the low nibble."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    return codes
