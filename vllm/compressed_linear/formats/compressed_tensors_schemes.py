# SPDX-License-Identifier: Apache-2.0
"""Layouts of compressed-tensors' weights (compressed_tensors ``compressors``).

* integers packed into int32 words (``weight_packed``): releases before 0.18 pack 3, 5, 6 and 7 bits
  without straddling words, later ones densely, under the same names; the stored width decides
* integers of up to 8 bits, one in each int8 (``weight``)
* fp8 (``weight``), with scales of any granularity, or powers of two (MXFP8)
* fp4, two in a byte (``weight_packed``): NVFP4 has e4m3 scales under ``weight_global_scale``, and
  MXFP4 powers of two. Global scales are divisors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import StrEnum

from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.formats.compressed_tensors_arguments import Arguments
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    ScaleSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import E2M1, E4M3, E5M2, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

_BYTES = ("uint8", "float8_e8m0fnu")

HeaderOf = Callable[[str], TensorHeader | None]
"""Last component of a tensor's name → its header; None if the file is not known or lacks it."""


class Form(StrEnum):
    """Container of the codes."""

    WORDS = "int32 words"
    INT8 = "int8"
    FP8 = "fp8"
    FP4 = "fp4"


class ZeroForm(StrEnum):
    """How ``weight_zero_point`` is stored. ``SIGNED``: one signed integer for each zero point, as
    next to weights that are not packed, and by early releases; ``UNKNOWN``: packed or signed, which
    the shape tells."""

    NONE = ""
    PACKED = "packed"
    SIGNED = "signed"
    UNKNOWN = "unknown"


def form_on_disk(header: HeaderOf) -> Form | None:
    """The container of a module's codes in the file; None if it does not show one."""
    packed, plain = header("weight_packed"), header("weight")
    if packed is not None:
        return {"int32": Form.WORDS, "uint8": Form.FP4}.get(packed.dtype)
    if plain is None:
        return None
    return {"int8": Form.INT8, "float8_e4m3fn": Form.FP8, "float8_e5m2": Form.FP8}.get(plain.dtype)


def input_tensors(spec: ActivationSpec, header: HeaderOf) -> tuple[StoredTensor, ...]:
    """Tensors with the numbers of inputs."""
    if spec.scale_dtype == "float8_e4m3fn":
        return (_number("input_global_scale", Role.INPUT_SCALE, reciprocal=True),)
    return _static("input", spec, header, Role.INPUT_SCALE, Role.INPUT_ZERO)


def output_tensors(spec: ActivationSpec, header: HeaderOf) -> tuple[StoredTensor, ...]:
    """Tensors with the numbers of outputs."""
    return _static("output", spec, header, Role.OUTPUT_SCALE, Role.OUTPUT_ZERO)


def _static(
    side: str, spec: ActivationSpec, header: HeaderOf, scale: Role, zero: Role
) -> tuple[StoredTensor, ...]:
    """Early releases wrote a zero point of 0 for symmetric ones, too."""
    if spec.dynamic:
        return ()
    tensors = (_number(f"{side}_scale", scale),)
    point = f"{side}_zero_point"
    if spec.element.kind != "integer" or (header(point) is None and spec.symmetric):
        return tensors
    return (*tensors, StoredTensor(point, zero, "int32", (1,), optional=spec.symmetric))


def _number(name: str, role: Role, *, reciprocal: bool = False) -> StoredTensor:
    return StoredTensor(name, role, "float32", (1,), reciprocal=reciprocal)


def pack_quantized_scheme(
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    group_index: bool,
    dense_first: bool = True,
    zeros: ZeroForm | None = None,
) -> CheckpointScheme:
    """Layout of one pack-quantized weight; ``group_size`` −1 means one scale per channel.

    ``zeros``: how zero points are stored; by default packed, and a symmetric weight has none.
    """
    if bits not in range(1, 9):
        raise ConfigError(f"pack-quantized weights with {bits} bits (supported: 1 to 8)")
    if zeros is None:
        zeros = ZeroForm.NONE if symmetric else ZeroForm.PACKED

    def packings(axis: str) -> tuple[Packing, ...]:
        both = (Packing(bits, axis), Packing(bits, axis, dense=False))
        if 32 % bits == 0:
            return both[:1]
        return both if dense_first else both[::-1]

    codes = packings("K")
    tensors = [
        StoredTensor("weight_packed", Role.CODES, "int32", ("N", "K"), codes[0], codes[1:]),
        StoredTensor("weight_scale", Role.SCALE, "float32", ("N", "G")),
        StoredTensor("weight_shape", Role.SHAPE, "int64", (2,), optional=True),
    ]
    if zeros is not ZeroForm.NONE:
        forms = packings("N") if zeros is not ZeroForm.SIGNED else ()
        if zeros is not ZeroForm.PACKED:
            forms = (*forms, Packing(bits, "N", signed=True, single=True))
        tensors.append(
            StoredTensor(
                *("weight_zero_point", Role.ZERO, "int32", ("N", "G"), forms[0], forms[1:]),
                optional=symmetric,
            )
        )
    if group_index:
        tensors.append(_group_index())
    scale = ScaleSpec("bfloat16", "channel" if group_size == -1 else "group", group_size)
    return CheckpointScheme(
        _integers(bits, scale, zeros),
        tuple(tensors),
        symmetric="symmetric: true" if symmetric and zeros is not ZeroForm.NONE else "",
    )


def _group_index() -> StoredTensor:
    return StoredTensor("weight_g_idx", Role.GROUP_INDEX, "int32", ("K",), optional=True)


def _integers(bits: int, scale: ScaleSpec, zeros: ZeroForm) -> WeightSpec:
    if zeros is ZeroForm.NONE:
        return WeightSpec(uint(bits, 1 << (bits - 1)), scale)
    return WeightSpec(uint(bits), scale, ZeroSpec("integer", "uint8"))


def int8_scheme(
    weights: Arguments, header: HeaderOf, *, zeros: ZeroForm, group_index: bool
) -> CheckpointScheme:
    """Layout of integers that are not packed, 4-bit ones too."""
    bits = weights.bits
    if bits not in range(1, 9):
        raise ConfigError(f"{weights.where}: {bits}-bit integers in int8 (supported: 1 to 8)")
    signed = Packing(bits, "K", "int8", signed=True, single=bits < 8)
    scale, stored = _scales(weights, header)
    tensors = [StoredTensor("weight", Role.CODES, "int8", ("N", "K"), signed), stored]
    if zeros is not ZeroForm.NONE:
        points = Packing(bits, "N", signed=True, single=True)
        tensors.append(
            StoredTensor(
                *("weight_zero_point", Role.ZERO, "int32", stored.axes, points),
                optional=weights.symmetric,
            )
        )
    if group_index:
        tensors.append(_group_index())
    symmetric = weights.symmetric and zeros is not ZeroForm.NONE
    return CheckpointScheme(
        _integers(bits, scale, zeros),
        tuple(tensors),
        symmetric="symmetric: true" if symmetric else "",
    )


def fp8_scheme(weights: Arguments, header: HeaderOf) -> CheckpointScheme:
    """Layout of fp8 weights, MXFP8 among them."""
    plain = header("weight")
    element = E5M2 if plain is not None and plain.dtype == "float8_e5m2" else E4M3
    dtype = "float8_e5m2" if element == E5M2 else "float8_e4m3fn"
    scale, stored = _scales(weights, header)
    tensors = (StoredTensor("weight", Role.CODES, dtype, ("N", "K")), stored)
    return CheckpointScheme(WeightSpec(element, scale), tensors)


def fp4_scheme(weights: Arguments, header: HeaderOf) -> CheckpointScheme:
    """Layout of NVFP4 and MXFP4 weights; the scales in the file tell which, if it is known."""
    scales = header("weight_scale")
    nvfp4 = weights.strategy == "tensor_group"
    if scales is not None and scales.dtype in ("float8_e4m3fn", *_BYTES):
        nvfp4 = scales.dtype == "float8_e4m3fn"
    packing = Packing(4, "K", "uint8")
    codes = StoredTensor("weight_packed", Role.CODES, "uint8", ("N", "K"), packing)
    size = _group_on_disk(header, weights.group_size, 16 if nvfp4 else 32)
    if nvfp4:
        scale = StoredTensor("weight_scale", Role.SCALE, "float8_e4m3fn", ("N", "G"))
        outer = _number("weight_global_scale", Role.ROW_SCALE, reciprocal=True)
        spec = ScaleSpec("float8_e4m3fn", "group", size)
        return CheckpointScheme(WeightSpec(E2M1, spec, None, "float32"), (codes, scale, outer))
    scale = StoredTensor("weight_scale", Role.SCALE, "uint8", ("N", "G"))
    return CheckpointScheme(WeightSpec(E2M1, ScaleSpec("e8m0", "group", size)), (codes, scale))


def _group_on_disk(header: HeaderOf, stated: int, usual: int) -> int:
    """The group size of the files: ``usual``, of NVFP4 or MX, if codes and scales have it, else
    ``stated``; any other is one of damaged scales."""
    codes, scales = header("weight_packed"), header("weight_scale")
    if codes is None or scales is None or len(codes.shape) != 2 or len(scales.shape) != 2:
        return stated
    return usual if usual * scales.shape[1] == 2 * codes.shape[1] else stated


def _scales(weights: Arguments, header: HeaderOf) -> tuple[ScaleSpec, StoredTensor]:
    """Scales of a weight that is not packed, as its tensors show them if the file is known, else as
    the configuration says."""
    codes, scales = header("weight"), header("weight_scale")
    powers = weights.powers
    if scales is not None and scales.dtype in (*_BYTES, "bfloat16", "float32"):
        powers = scales.dtype in _BYTES
    layouts = [_layout(weights.strategy, weights, powers)]
    if codes is None or scales is None or len(codes.shape) != 2:
        return layouts[0]
    n, k = codes.shape
    shape = scales.shape
    layouts += _others(weights, n, k, shape, powers)
    for scale, stored in layouts:
        if _shape_of(scale, stored, n, k) == shape or (len(stored.axes) == 1 == _size(shape)):
            return scale, stored
    return layouts[0]


def _others(
    weights: Arguments, n: int, k: int, shape: tuple[int, ...], powers: bool
) -> Iterator[tuple[ScaleSpec, StoredTensor]]:
    """Layouts that the configuration does not state, as far as a shape can tell them. Another size
    of groups than it states is one of damaged scales."""
    if _size(shape) == 1 and n > 1:
        yield _layout("tensor", weights, powers)
    if len(shape) == 1 and shape[0] == n:
        scale, stored = _layout("channel", weights, powers)
        yield scale, replace(stored, axes=("N",))
    if len(shape) == 2 and shape[0] == n and shape[1] and k % shape[1] == 0:
        size = -1 if shape[1] == 1 else k // shape[1]
        if weights.strategy == "group" and size != -1:
            return
        strategy = "channel" if size == -1 else "group"
        yield _layout(strategy, replace(weights, group_size=size), powers)
    yield _layout("block", replace(weights, block=(128, 128)), powers)


def _size(shape: Sequence[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def _shape_of(scale: ScaleSpec, stored: StoredTensor, n: int, k: int) -> tuple[int, ...]:
    size = k if scale.granularity in ("tensor", "channel") else scale.group_size
    return stored.shape({"N": n, "K": k, "G": -(-k // size), "B": -(-n // scale.block_rows)})


def _layout(strategy: str, weights: Arguments, powers: bool) -> tuple[ScaleSpec, StoredTensor]:
    dtype, container = ("e8m0", "uint8") if powers else ("float32", "float32")
    axes: tuple[str | int, ...] = ("N", "G")
    if strategy == "tensor":
        scale, axes = ScaleSpec(dtype, "tensor"), (1,)
    elif strategy == "channel":
        scale = ScaleSpec(dtype, "channel")
    elif strategy == "block":
        rows, columns = weights.block
        scale, axes = ScaleSpec(dtype, "block", columns, rows), ("B", "G")
    else:
        scale = ScaleSpec(dtype, "group", weights.group_size)
    return scale, StoredTensor("weight_scale", Role.SCALE, container, axes)
