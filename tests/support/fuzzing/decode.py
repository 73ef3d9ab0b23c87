# SPDX-License-Identifier: Apache-2.0
"""What the tensors of the small checkpoints say, in numpy: shares no code with the package.

Written from the tools' own packers (AutoGPTQ, GPTQModel, AutoAWQ, compressed-tensors), and compared
with what their libraries gave (``tests/fuzzing/test_decode.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.fuzzing import decode_floats
from tests.support.fuzzing.files import Tensor
from tests.support.fuzzing.numbers import FLOATS, Array, NoMeaningError, floats

INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
INTEGERS |= {"U64": "<u8", "U32": "<u4", "U16": "<u2"}
OPTIONAL = ("qzeros", "g_idx", "weight_shape")
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Stored:
    """How the unchanged checkpoint stores one layer. ``family``: the packer. ``bits``: 16 for a
    plain weight. ``ordered``: the configuration says that g_idx reorders channels."""

    family: str
    n: int
    k: int
    bits: int
    groups: int
    shapes: dict[str, tuple[int, ...]]
    ordered: bool = False
    symmetric: bool = False
    block: tuple[int, int] = (128, 128)
    inverse: bool = False
    """Of scales of 8-bit codes: rows and channels that share one, and whether they are divisors."""


def stored_layers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Layer → how it is stored, for every matrix but tables, from shapes alone."""
    quantization = config["quantization_config"]
    family = _family(quantization)
    ordered, symmetric = flags(quantization)
    found = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        own = {
            name.rpartition(".")[2]: tensor
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] == module
        }
        shapes = {last: tensor.shape for last, tensor in own.items()}
        plain = "weight" in own and own["weight"].dtype in ("BF16", *FLOATS)
        if plain and len(shapes["weight"]) == 2 and "embed" not in module:
            n, k = shapes["weight"]
            found[module] = Stored("plain", n, k, 16, 1, shapes)
        elif (small := decode_floats.family_of(own)) is not None:
            codes = shapes.get("weight", shapes.get("weight_packed", (0, 0)))
            n, k = decode_floats.extents(small, codes)
            inverse = quantization.get("weight_scale_semantics") == "inverse"
            block = decode_floats.block_of(quantization)
            bits = {"eight": 8, "mxfp6": 6}.get(small, 4)
            found[module] = Stored(small, n, k, bits, 1, shapes, block=block, inverse=inverse)
        elif "weight_packed" in own:
            n, groups = shapes["weight_scale"]
            k = int(np.frombuffer(own["weight_shape"].data, "<i8")[1])
            bits = shapes["weight_packed"][1] * 32 // k
            found[module] = Stored("packed", n, k, bits, groups, shapes)
        elif "qweight" in own:
            n, k, groups = _extents(family, module, config, shapes)
            bits = 4 if "awq" in family else shapes["qweight"][0] * 32 // k
            found[module] = Stored(family, n, k, bits, groups, shapes, ordered, symmetric)
    return found


def flags(quantization: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a configuration says that g_idx reorders channels, and that there are no zero
    points."""
    symmetric = bool(quantization.get("sym")) or quantization.get("zero_point") is False
    return bool(quantization.get("desc_act")), symmetric


def _family(quantization: Mapping[str, Any]) -> str:
    method = quantization["quant_method"]
    if method == "awq":
        return f"awq_{quantization['version']}"
    if method == "auto-round":
        packing = quantization["packing_format"]
        return {"auto_round": "gptq_v2", "auto_round:auto_awq": "awq_gemm"}.get(packing, "gptq")
    return str(quantization.get("checkpoint_format", "packed"))


def _extents(
    family: str, module: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, int, int]:
    """(N, K, G)"""
    quantization = config["quantization_config"]
    if family == "awq_gemv":
        n, k = shapes["qweight"][0], shapes["qweight"][1] * 8
        return n, k, k // quantization["group_size"]
    if family == "awq_gemv_fast":
        n, k = shapes["qweight"][0] * 4, shapes["qweight"][1]
        return n, k, k // quantization["group_size"]
    groups, n = shapes["scales"]
    if family == "awq_gemm":
        return n, shapes["qweight"][0], groups
    k = config["intermediate_size" if module.endswith("down_proj") else "hidden_size"]
    return n, k, groups


def weight(layer: str, stored: Stored, tensors: Mapping[str, Tensor]) -> Array:
    """float64 [N, K] of one layer of a mutant. Raises ``NoMeaningError``."""
    own = {
        last: tensors[f"{layer}.{last}"] for last in stored.shapes if f"{layer}.{last}" in tensors
    }
    # Some tools write an empty tensor where they have none.
    own = {last: t for last, t in own.items() if t.data or last not in OPTIONAL}
    for last, tensor in own.items():
        numbers = {int(np.prod(tensor.shape)), int(np.prod(stored.shapes[last]))} == {1}
        if tensor.shape != stored.shapes[last] and not numbers:
            raise NoMeaningError(f"{last} has another shape")
    try:
        if stored.family == "eight":
            return decode_floats.eight(stored.n, stored.k, stored.block, stored.inverse, own)
        if (small := _SMALL.get(stored.family)) is not None:
            return small(stored.n, stored.k, own)
        return _DECODERS[stored.family](stored, own)
    except KeyError as error:
        raise NoMeaningError(f"{error} is missing") from None


def _words(tensor: Tensor, dtype: str = "I32") -> Array:
    if tensor.dtype not in (dtype, dtype.replace("I", "U")):
        raise NoMeaningError(f"{tensor.dtype} where {dtype} is packed")
    return np.frombuffer(tensor.data, INTEGERS[dtype]).reshape(tensor.shape)


def _codes(words: Array, bits: int, length: int, planes: tuple[int, ...] = ()) -> Array:
    """int [rows, length] from int32 [rows, words]: a little-endian stream, or bit planes."""
    rows = words.shape[0]
    raw = np.ascontiguousarray(words.astype("<i4")).view(np.uint8).reshape(rows, -1)
    stream = np.unpackbits(raw, axis=1, bitorder="little").astype(np.int64)
    if not planes:
        whole = stream[:, : length * bits].reshape(rows, length, bits)
        return whole @ (1 << np.arange(bits))
    # 32 codes take `bits` words: the words of the low plane first.
    blocks = stream.reshape(rows, -1, bits * 32)
    codes, below = np.zeros((rows, blocks.shape[1], 32), np.int64), 0
    for width in planes:
        part = blocks[:, :, below * 32 : (below + width) * 32].reshape(rows, -1, 32, width)
        codes += (part @ (1 << np.arange(width))) << below
        below += width
    return codes.reshape(rows, -1)[:, :length]


def _combine(
    stored: Stored, codes: Array, scale: Array, zero: Array | int, index: Array | None = None
) -> Array:
    """(codes − zero)·scale; ``scale`` and ``zero`` [N, G]."""
    if index is None:
        index = np.arange(stored.k) // (stored.k // stored.groups)
    points = zero if isinstance(zero, int) else zero[:, index]
    wide = scale[:, index]
    values = codes - points
    if not np.isfinite(wide).all():
        raise NoMeaningError("a scale is not finite")
    if ((wide == 0) & (values != 0)).any():
        raise NoMeaningError("a scale is 0 over codes that are not")
    return values * wide


def _gptq(stored: Stored, own: Mapping[str, Tensor]) -> Array:
    bits, n, k = stored.bits, stored.n, stored.k
    planes = PLANES.get(bits, ()) if stored.family == "gptq_p" else ()
    codes = _codes(_words(own["qweight"]).T, bits, k, planes)
    middle = 1 << (bits - 1)
    if "qzeros" not in own and stored.symmetric:
        return _combine(stored, codes, floats(own["scales"]).T, middle, _order(stored, own))
    fields = _words(own["qzeros"])
    if stored.family == "gptq" and 32 % bits == 0:
        # 1 was subtracted from every field of the whole word, so borrows cross fields.
        ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
        fields = (fields.view(np.uint32) + ones).view(np.int32)
    zero = _codes(fields, bits, n, planes).T
    if stored.family == "gptq" and 32 % bits:
        zero = (zero + 1) % (1 << bits)
    return _combine(stored, codes, floats(own["scales"]).T, zero, _order(stored, own))


def _order(stored: Stored, own: Mapping[str, Tensor]) -> Array | None:
    """int [K]: the group of each channel, None for channels in order."""
    if "g_idx" in own:
        if own["g_idx"].dtype not in INTEGERS:
            raise NoMeaningError("g_idx is not an integer")
        index = np.frombuffer(own["g_idx"].data, INTEGERS[own["g_idx"].dtype]).astype(np.int64)
        if index.min() < 0 or index.max() >= stored.groups:
            raise NoMeaningError("g_idx is out of range")
        return index if index.any() else None  # all zeros: the tools' word for "no order"
    if stored.ordered and stored.groups > 1:
        raise NoMeaningError("desc_act without g_idx")
    return None


def _awq_gemm(stored: Stored, own: Mapping[str, Tensor]) -> Array:
    inverse = np.argsort(AWQ_ORDER)

    def unpacked(tensor: Tensor) -> Array:
        words = _words(tensor)
        codes = _codes(words, 4, words.shape[1] * 8).reshape(len(words), -1, 8)
        return codes[:, :, inverse].reshape(len(words), -1)

    zero: Array | int = 8
    if "qzeros" in own or not stored.symmetric:
        zero = unpacked(own["qzeros"]).T
    return _combine(stored, unpacked(own["qweight"]).T, floats(own["scales"]).T, zero)


def _awq_gemv(stored: Stored, own: Mapping[str, Tensor]) -> Array:
    codes = _codes(_words(own["qweight"]), 4, stored.k)
    zero = _codes(_words(own["qzeros"]), 4, stored.groups)
    return _combine(stored, codes, floats(own["scales"])[:, : stored.groups], zero)


def _awq_gemv_fast(stored: Stored, own: Mapping[str, Tensor]) -> Array:
    n, k, groups = stored.n, stored.k, stored.groups
    words = _words(own["qweight"], "I16").view("<u2").astype(np.int64)
    nibbles = (words[:, :, None] >> np.arange(0, 16, 4)) & 15
    # Four rows of 64 places in a line of 256 nibbles.
    lines = nibbles.reshape(n // 4, k // 64, 4, 64).transpose(0, 2, 1, 3).reshape(n, k)
    channel = np.arange(32)
    place = channel % 8 // 2 * 8 + channel % 2 * 4 + channel // 8
    codes = lines.reshape(n, -1, 32)[:, :, place].reshape(n, k)
    scale, zero = floats(own["scales"])[:groups].T, floats(own["qzeros"])[:groups].T
    index = np.arange(k) // (k // groups)
    if not (np.isfinite(scale).all() and np.isfinite(zero).all()):
        raise NoMeaningError("a scale or zero point is not finite")
    if (scale[:, index] == 0).any() and ((scale[:, index] == 0) & (codes != 0)).any():
        raise NoMeaningError("a scale is 0 over codes that are not")
    return codes * scale[:, index] + zero[:, index]


def _packed(stored: Stored, own: Mapping[str, Tensor]) -> Array:
    codes = _codes(_words(own["weight_packed"]), stored.bits, stored.k)
    zero: Array | int = 1 << (stored.bits - 1)
    if "weight_zero_point" in stored.shapes:
        zero = _codes(_words(own["weight_zero_point"]).T, stored.bits, stored.n).T
    shape = own.get("weight_shape")
    if shape is not None:
        found = np.frombuffer(shape.data, INTEGERS.get(shape.dtype, "<i8")).tolist()
        if found != [stored.n, stored.k]:
            raise NoMeaningError("weight_shape says another shape")
    return _combine(stored, codes, floats(own["weight_scale"]), zero)


def _plain(stored: Stored, own: Mapping[str, Tensor]) -> Array:
    return floats(own["weight"])


_SMALL = {
    "nvfp4": decode_floats.nvfp4,
    "mxfp4": decode_floats.mxfp4,
    "int4_rows": decode_floats.int4_rows,
    "mxfp6": decode_floats.mxfp6,
    "quark_words": decode_floats.quark_words,
    "quark_two_levels": decode_floats.quark_two_levels,
}
_DECODERS = {
    "plain": _plain,
    "packed": _packed,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "gptq_p": _gptq,
    "awq_gemm": _awq_gemm,
    "awq_gemv": _awq_gemv,
    "awq_gemv_fast": _awq_gemv_fast,
}
