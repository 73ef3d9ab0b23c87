# SPDX-License-Identifier: Apache-2.0
"""What tensors of small floats and of unpacked integers say, in numpy: shares no code with the
package. ``decode.py`` has the layouts of packed integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.support import float_definitions as definitions
from tests.support.fuzzing.files import Tensor
from tests.support.fuzzing.numbers import Array, NoMeaningError, floats

FLOATS8 = {"F8_E4M3": definitions.E4M3, "F8_E5M2": definitions.E5M2, "F8_E8M0": definitions.E8M0}
SCALES = ("weight_scale", "weight_scale_inv")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SECOND = ("weight_scale_2", "weight_global_scale")


def family_of(own: Mapping[str, Tensor]) -> str | None:
    """The family of a layer with these tensors: how its codes are stored; None for another kind."""
    codes = own.get("weight", own.get("weight_packed"))
    scale = next((own[name] for name in SCALES if name in own), None)
    if codes is None or scale is None:
        return None
    if codes.dtype == "I32" and "weight" in own:
        return "quark_two_levels" if "weight_scale_2" in own else "quark_words"
    if codes.dtype == "U8":
        if scale.dtype == "F8_E4M3":
            return "nvfp4"
        if scale.dtype != "U8":
            return "int4_rows"
        return "mxfp4" if codes.shape[1] == 16 * scale.shape[1] else "mxfp6"
    return "eight" if "weight" in own and codes.dtype in ("I8", "F8_E4M3", "F8_E5M2") else None


def extents(family: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(N, K) of a layer whose codes have this shape."""
    n, k = shape
    return {
        "eight": (n, k),
        "int4_rows": (2 * n, k),
        "mxfp6": (n, 4 * k // 3),
        "quark_words": (8 * k, n),
        "quark_two_levels": (n, 8 * k),
    }.get(family, (n, 2 * k))


def block_of(quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and channels that share a scale, where scales are per block."""
    try:
        rows, channels = (int(float(size)) for size in quantization["weight_block_size"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return 128, 128
    return max(rows, 1), max(channels, 1)


def eight(
    n: int, k: int, block: tuple[int, int], inverse: bool, own: Mapping[str, Tensor]
) -> Array:
    """One code in a byte, and scales of any shape."""
    tensor = own["weight"]
    raw = np.frombuffer(tensor.data, "u1")
    if tensor.dtype == "I8":
        codes = raw.view("i1").astype(np.float64).reshape(n, k)
    elif tensor.dtype in ("F8_E4M3", "F8_E5M2"):
        codes = FLOATS8[tensor.dtype][raw].reshape(n, k)
    else:
        raise NoMeaningError(f"{tensor.dtype} where one code is in a byte")
    if not np.isfinite(codes).all():
        raise NoMeaningError("a code is not finite")
    scale = _scales(_first(own, SCALES))
    if inverse:
        with np.errstate(divide="ignore"):
            scale = (np.float32(1) / scale.astype(np.float32)).astype(np.float64)
    return _scaled(codes, _spread(scale, n, k, block))


def nvfp4(n: int, k: int, own: Mapping[str, Tensor]) -> Array:
    """e2m1 with e4m3 scales under one of the tensor: a factor or a divisor."""
    scale = _first(own, SCALES)
    if scale.dtype != "F8_E4M3":
        raise NoMeaningError(f"{scale.dtype} where scales are e4m3")
    second = floats(_first(own, SECOND))
    factor = second if "weight_scale_2" in own else 1 / second.astype(np.float32)
    if not np.isfinite(factor).all():
        raise NoMeaningError("the second scale is not finite")
    wide = _spread(_scales(scale), n, k, (1, k))
    if not np.isfinite(wide).all():
        raise NoMeaningError("a scale is not finite")
    result: Array = definitions.E2M1[_nibbles(own)] * wide * float(factor.reshape(-1)[0])
    return result


def mxfp4(n: int, k: int, own: Mapping[str, Tensor]) -> Array:
    """e2m1 with powers of two."""
    scale = _first(own, SCALES)
    if scale.dtype not in ("U8", "F8_E8M0"):
        raise NoMeaningError(f"{scale.dtype} where scales are e8m0")
    return _scaled(definitions.E2M1[_nibbles(own)], _spread(_scales(scale), n, k, (1, k)))


def mxfp6(n: int, k: int, own: Mapping[str, Tensor]) -> Array:
    """e3m2 with powers of two: four codes in three bytes, low bits first."""
    tensor, scale = own["weight"], _first(own, SCALES)
    if tensor.dtype != "U8" or scale.dtype not in ("U8", "F8_E8M0"):
        raise NoMeaningError("bytes of another dtype")
    raw = np.frombuffer(tensor.data, "u1").reshape(n, -1)
    bits = np.unpackbits(raw, axis=1, bitorder="little").reshape(n, k, 6)
    codes = bits @ (1 << np.arange(6))
    return _scaled(definitions.E3M2[codes], _spread(_scales(scale), n, k, (1, k)))


def quark_words(n: int, k: int, own: Mapping[str, Tensor]) -> Array:
    """Eight output channels in a word, and zero points in the same way."""
    codes, zero = _in_words(own["weight"], k), _in_words(own["weight_zero_point"], None)
    scale = floats(_first(own, SCALES))
    size = k // len(scale)
    values = (codes - np.repeat(zero, size, 0)).T
    return _scaled(values.astype(np.float64), np.repeat(scale, size, 0).T)


def quark_two_levels(n: int, k: int, own: Mapping[str, Tensor]) -> Array:
    """Eight input channels in a word, in two's complement, under a scale of the row and one of
    the tensor."""
    codes = _in_words(own["weight"], n)
    codes = np.where(codes > 7, codes - 16, codes).astype(np.float64)
    scale = floats(_first(own, SCALES)).reshape(-1, 1) * floats(own["weight_scale_2"])[:, None]
    return _scaled(codes, np.broadcast_to(scale, codes.shape))


def _in_words(tensor: Tensor, rows: int | None) -> Array:
    """Codes of int32 words in AWQ's order along the last axis."""
    if tensor.dtype not in ("I32", "U32"):
        raise NoMeaningError(f"{tensor.dtype} where int32 is packed")
    words = np.frombuffer(tensor.data, "<u4").reshape(tensor.shape).astype(np.int64)
    slots = (words[:, :, None] >> np.arange(0, 32, 4)) & 15
    return slots[:, :, np.argsort(AWQ_ORDER)].reshape(rows or len(words), -1)


def int4_rows(n: int, k: int, own: Mapping[str, Tensor]) -> Array:
    """Two output channels in a byte, in two's complement."""
    if own["weight"].dtype != "U8":
        raise NoMeaningError(f"{own['weight'].dtype} where two codes are in a byte")
    raw = np.frombuffer(own["weight"].data, "u1").reshape(n // 2, k)
    codes = np.empty((n, k), np.int64)
    codes[0::2], codes[1::2] = raw & 15, raw >> 4
    codes = np.where(codes > 7, codes - 16, codes).astype(np.float64)
    return _scaled(codes, _spread(floats(_first(own, SCALES)), n, k, (1, k)))


def _first(own: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    for name in names:
        if name in own:
            return own[name]
    raise KeyError(names[0])


def _nibbles(own: Mapping[str, Tensor]) -> Array:
    tensor = _first(own, ("weight", "weight_packed"))
    if tensor.dtype != "U8":
        raise NoMeaningError(f"{tensor.dtype} where two codes are in a byte")
    raw = np.frombuffer(tensor.data, "u1").reshape(tensor.shape)
    return definitions.low_nibbles_first(raw)


def _scales(tensor: Tensor) -> Array:
    if tensor.dtype in ("U8", "F8_E8M0"):
        raw = np.frombuffer(tensor.data, "u1")
        return np.append(definitions.E8M0, np.nan)[raw].reshape(tensor.shape)
    if tensor.dtype in FLOATS8:
        return FLOATS8[tensor.dtype][np.frombuffer(tensor.data, "u1")].reshape(tensor.shape)
    return floats(tensor)


def _spread(scale: Array, n: int, k: int, block: tuple[int, int]) -> Array:
    """One scale for each weight."""
    if scale.size == 1:
        return np.full((n, k), float(scale.reshape(-1)[0]))
    if scale.ndim == 4 and scale.shape[1] == scale.shape[3] == 1:
        scale = scale[:, 0, :, 0]
    if scale.ndim == 1 and scale.shape[0] == n:
        scale = scale[:, None]
    if scale.ndim != 2:
        raise NoMeaningError("scales of a shape that says nothing")
    rows, columns = scale.shape
    if rows == n and not k % columns:
        return np.repeat(scale, k // columns, 1)
    if (rows, columns) != (-(-n // block[0]), -(-k // block[1])):
        raise NoMeaningError("scales of another number of blocks")
    return definitions.spread(scale, n, block, k)


def _scaled(codes: Array, wide: Array) -> Array:
    if not np.isfinite(wide).all():
        raise NoMeaningError("a scale is not finite")
    if ((wide == 0) & (codes != 0)).any():
        raise NoMeaningError("a scale is 0 over codes that are not")
    result: Array = codes * wide
    return result
