# SPDX-License-Identifier: Apache-2.0
"""What integer activations and MXFP4 inputs mean, in numpy; imports nothing of the package.

* int8 per token, symmetric: vLLM ``csrc`` ``scaled_int8_quant`` (scale = max|x| / 127)
* int8 per token, asymmetric: scale = (max(x, 0) − min(x, 0)) / 255, the zero point is
  round(−128 − min / scale)
* static: ``CompressedTensorsWNA8O8Int`` and ``static_scaled_int8_quant``: round(x / scale) + zero,
  clamped to −128 … 127
* MXFP4: OCP Microscaling Formats Specification 1.0, section 6.3, with max|x| rounded to the
  mantissa of e2m1 first (vLLM ``utils/mxfp4_utils.py``, Quark's "even" mode)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tests.support.float_definitions import E2M1, Floats, Single, rounded


def int8_per_token(x: Single, *, symmetric: bool = True, bits: int = 8) -> Floats:
    """x [M, K] through integers with a scale, and a zero point, for each token."""
    half = 1 << (bits - 1)
    if symmetric:
        scale = np.abs(x).max(1, keepdims=True) / np.float32(half - 1)
        zero: npt.NDArray[np.float32] | float = 0.0
    else:
        low = np.minimum(x.min(1, keepdims=True), np.float32(0))
        high = np.maximum(x.max(1, keepdims=True), np.float32(0))
        scale = (high - low) / np.float32(2 * half - 1)
        scale = np.where(scale == 0, np.float32(1), scale)
        zero = np.clip(np.rint(np.float32(-half) - low / scale), -half, half - 1)
    safe = np.where(scale == 0, np.float32(1), scale)
    codes = np.clip(np.rint(x / safe) + zero, -half, half - 1)
    result: Floats = (codes - zero).astype(np.float64) * scale.astype(np.float64)
    return result


def int8_static(x: Single, scale: float, zero: int = 0) -> Floats:
    """x [M, K] through int8 with the numbers of the file."""
    codes = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)) + zero, -128, 127)
    result: Floats = (codes - zero).astype(np.float64) * float(np.float32(scale))
    return result


def mx(x: Single, table: Floats, mantissa: int, power: int) -> Floats:
    """x [M, K] through small floats with powers of two for 32 channels. ``mantissa``: bits to which
    max|x| is rounded; ``power``: exponent of the type's largest power of two."""
    groups = x.astype(np.float64).reshape(x.shape[0], -1, 32)
    largest = np.abs(groups).max(2, keepdims=True)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(largest))
        # From there on the next power of two is nearer.
        exponent += largest / np.exp2(exponent) >= 2 - 2.0 ** -(mantissa + 1)
    scale = np.exp2(np.where(np.isfinite(exponent), exponent - power, -127.0))
    result: Floats = (rounded(groups / scale, table) * scale).reshape(x.shape)
    return result


def mxfp4(x: Single) -> Floats:
    """x [M, K] through e2m1 with powers of two for 32 channels."""
    return mx(x, E2M1, 1, 2)
