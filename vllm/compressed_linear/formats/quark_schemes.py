# SPDX-License-Identifier: Apache-2.0
"""Layouts of AMD Quark's weights (amd-quark ``torch/export``; vLLM's ``quark/schemes``).

* int4 and uint4: eight in an int32 word; per group along N of a transposed matrix, else along K.
  ``pack_method`` "reorder" has AWQ's order of nibbles, "order" plain words
* int8 and uint8: ``weight`` [N, K], per group transposed, too; fp8: ``weight`` [N, K]
* fp4, fp6: OCP MX with E8M0 scales of 32 channels, or NVFP4 with e4m3 scales of 16; low bits first
* two levels of scales (int4 + fp8, NVFP4): ``weight_scale_2``. All of them are multiplied
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.spec.activation import JUST_ABOVE_224, nvfp4_input
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    ScaleSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import E2M1, E2M3, E3M2, E4M3, E5M2, INT8, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

ORDERS: dict[str, tuple[int, ...]] = {"reorder": (0, 2, 4, 6, 1, 3, 5, 7), "order": ()}
FLOATS = {
    "fp8_e4m3": E4M3,
    "fp8_e5m2": E5M2,
    "fp4": E2M1,
    "fp6_e3m2": E3M2,
    "fp6_e2m3": E2M3,
}
SCHEMES = ("per_tensor", "per_channel", "per_token", "per_group", "per_block")
_EVEN = {E2M1: 3.5, E3M2: 15.0, E2M3: 3.875, E4M3: JUST_ABOVE_224}
"""``maximum`` of MX inputs in vLLM: max|x| is rounded to the type's mantissa first; fp8 ones never
saturate."""

HeaderOf = Callable[[str], TensorHeader | None]


@dataclass(frozen=True)
class TensorConfig:
    """How a tensor is quantized: one entry of ``weight``, ``input_tensors`` or ``output_tensors``.
    ``powers``: scales are powers of two. ``block``: rows and channels of ``per_block``."""

    where: str
    dtype: str
    scheme: str
    group_size: int
    block: tuple[int, int]
    symmetric: bool
    dynamic: bool
    powers: bool

    @classmethod
    def read(cls, fields: Fields) -> Self:
        """Raises ``ConfigError`` naming the field."""
        symmetric = fields.flag("symmetric")
        sizes = fields.values.get("block_size") or (0, 0)
        if not isinstance(sizes, list | tuple) or len(sizes) != 2:
            raise ConfigError(f"{fields.where}.block_size is {sizes!r}, expected two numbers")
        numbers = Fields({"rows": sizes[0], "columns": sizes[1]}, f"{fields.where}.block_size")
        e8m0 = fields.word("scale_format") == "e8m0" or "e8m0" in fields.word("scale_type")
        return cls(
            fields.where,
            fields.word("dtype"),
            fields.word("qscheme") or "per_tensor",
            fields.integer("group_size", default=-1),
            (numbers.integer("rows", default=0), numbers.integer("columns", default=0)),
            True if symmetric is None else symmetric,
            bool(fields.flag("is_dynamic")),
            e8m0,
        )

    def __str__(self) -> str:
        size = f" of {self.group_size}" if self.scheme == "per_group" else ""
        return (
            f"{self.dtype} {'dynamic' if self.dynamic else 'static'} "
            f"{self.scheme.replace('_', ' ')}{size}{'' if self.symmetric else ', asymmetric'}"
        )


def activation_of(inputs: list[TensorConfig]) -> ActivationSpec | None:
    """What vLLM computes for inputs; None if nothing is known of it. Dynamic scales of a tensor
    are those of tokens there."""
    if len(inputs) == 2 and [entry.dtype for entry in inputs] == ["fp4", "fp8_e4m3"]:
        return nvfp4_input(inputs[0].group_size)
    if len(inputs) != 1:
        return None
    (entry,) = inputs
    if entry.scheme not in SCHEMES:
        return None
    element = INT8 if entry.dtype == "int8" else FLOATS.get(entry.dtype)
    if element is None or (element != INT8 and not entry.symmetric):
        return None
    if entry.powers:
        if not entry.dynamic or element not in _EVEN:
            return None
        size = entry.group_size if entry.scheme == "per_group" else entry.block[1]
        return ActivationSpec(element, True, "group", True, size, "e8m0", _EVEN[element])
    if element not in (INT8, E4M3, E5M2):
        return None
    maximum = 127.0 if element == INT8 else element.largest
    if not entry.dynamic:
        if entry.scheme != "per_tensor":
            return None
        return ActivationSpec(element, False, "tensor", entry.symmetric, maximum=maximum)
    if entry.scheme == "per_group":
        size = entry.group_size
        return ActivationSpec(element, True, "group", entry.symmetric, size, maximum=maximum)
    return ActivationSpec(element, True, "token", entry.symmetric, maximum=maximum)


def input_tensors(spec: ActivationSpec, header: HeaderOf) -> tuple[StoredTensor, ...]:
    """Tensors with the numbers of inputs."""
    if spec.scale_dtype == "float8_e4m3fn":
        return (StoredTensor("input_scale_2", Role.INPUT_SCALE, "float32", (1,)),)
    if spec.dynamic:
        return ()
    scale = StoredTensor("input_scale", Role.INPUT_SCALE, "float32", (1,))
    if spec.element.kind != "integer" or (spec.symmetric and header("input_zero_point") is None):
        return (scale,)
    zero = StoredTensor("input_zero_point", Role.INPUT_ZERO, "int32", (1,), optional=spec.symmetric)
    return scale, zero


def weight_scheme(
    entries: list[TensorConfig], pack_method: str, header: HeaderOf
) -> CheckpointScheme | None:
    """Layout of a weight; None if its kind is not known. The shapes of its scales count where the
    file is known."""
    kinds = [entry.dtype for entry in entries]
    if any(entry.scheme not in SCHEMES for entry in entries):
        return None
    if kinds == ["fp8_e4m3", "int4"]:
        return _int4(entries[1], pack_method, header, level="_2")
    if kinds == ["fp4", "fp8_e4m3"]:
        return _nvfp4(entries[0])
    if len(entries) != 1:
        return None
    (entry,) = entries
    if entry.dtype in ("int4", "uint4"):
        return _int4(entry, pack_method, header)
    if entry.dtype in ("int8", "uint8"):
        return _int8(entry, header)
    if entry.dtype in FLOATS:
        return _floats(entry, header)
    return None


def _int4(
    entry: TensorConfig, pack_method: str, header: HeaderOf, level: str = ""
) -> CheckpointScheme | None:
    """``level``: end of the names of the scales of two levels, under a scale of the tensor."""
    order = ORDERS.get(pack_method)
    grouped = entry.scheme == "per_group"
    if order is None or entry.scheme not in ("per_group", "per_channel", "per_tensor"):
        return None
    # Symmetric codes are two's complement.
    signed = entry.dtype == "int4"
    axes: tuple[str, str] = ("K", "N") if grouped else ("N", "K")
    packing = Packing(4, axes[1], order=order, signed=signed)
    points = Packing(4, "N", order=order, signed=signed)
    if grouped:
        stored: tuple[str | int, ...] = ("G", "N")
        scale = ScaleSpec("float32", "group", entry.group_size)
    else:
        scale, stored = _scale(entry, header, f"weight_scale{level}")
    tensors = [
        StoredTensor("weight", Role.CODES, "int32", axes, packing),
        StoredTensor(f"weight_scale{level}", Role.SCALE, "float32", stored),
    ]
    zero_axes = ("G", "N") if grouped else ("N",)
    zero = f"weight_zero_point{level}"
    asymmetric = not entry.symmetric
    if asymmetric or header(zero) is not None:
        # Next to a symmetric weight there are zeros only.
        role = Role.ZERO if asymmetric or grouped else Role.IGNORED
        tensors.append(
            StoredTensor(zero, role, "int32", zero_axes, points, optional=not asymmetric)
        )
    if level:
        tensors.append(StoredTensor("weight_scale", Role.ROW_SCALE, "float32", (1,)))
    pointed = any(tensor.role is Role.ZERO for tensor in tensors)
    weight = WeightSpec(
        uint(4) if pointed else uint(4, 8 if signed else 0),
        scale,
        ZeroSpec("integer", "uint8") if pointed else None,
        "float32" if level else None,
    )
    symmetric = "symmetric: true" if pointed and entry.symmetric else ""
    return CheckpointScheme(weight, tuple(tensors), symmetric=symmetric)


def _int8(entry: TensorConfig, header: HeaderOf) -> CheckpointScheme | None:
    if entry.scheme not in ("per_tensor", "per_channel", "per_group", "per_block"):
        return None
    signed = entry.dtype == "int8"
    if entry.symmetric and not signed:
        return None
    scale, axes = _scale(entry, header, "weight_scale")
    codes: tuple[str, str] = ("N", "K")
    if entry.scheme == "per_group":
        codes, axes = ("K", "N"), ("G", "N")
    packing = Packing(8, codes[1], entry.dtype, signed=signed)
    tensors = [
        StoredTensor("weight", Role.CODES, entry.dtype, codes, packing),
        StoredTensor("weight_scale", Role.SCALE, "float32", axes),
    ]
    if entry.symmetric and header("weight_zero_point") is None:
        return CheckpointScheme(WeightSpec(INT8, scale), tuple(tensors))
    points = Packing(8, "N", signed=signed, single=True)
    tensors.append(
        StoredTensor(
            "weight_zero_point", Role.ZERO, "int32", axes, points, optional=entry.symmetric
        )
    )
    return CheckpointScheme(
        WeightSpec(uint(8), scale, ZeroSpec("integer", "uint8")),
        tuple(tensors),
        symmetric="symmetric: true" if entry.symmetric else "",
    )


def _floats(entry: TensorConfig, header: HeaderOf) -> CheckpointScheme | None:
    element = FLOATS[entry.dtype]
    if not entry.symmetric:
        return None
    if element.bits < 8 and not (entry.powers and entry.scheme == "per_group"):
        return None
    scale, axes = _scale(entry, header, "weight_scale")
    dtype = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2"}.get(element, "uint8")
    packing = Packing(element.bits, "K", "uint8") if element.bits < 8 else None
    container = "uint8" if entry.powers else "float32"
    tensors = (
        StoredTensor("weight", Role.CODES, dtype, ("N", "K"), packing),
        StoredTensor("weight_scale", Role.SCALE, container, axes),
    )
    return CheckpointScheme(WeightSpec(element, scale), tensors)


def _nvfp4(entry: TensorConfig) -> CheckpointScheme:
    packing = Packing(4, "K", "uint8")
    scale = ScaleSpec("float8_e4m3fn", "group", entry.group_size)
    tensors = (
        StoredTensor("weight", Role.CODES, "uint8", ("N", "K"), packing),
        StoredTensor("weight_scale", Role.SCALE, "float8_e4m3fn", ("N", "G")),
        StoredTensor("weight_scale_2", Role.ROW_SCALE, "float32", (1,)),
    )
    return CheckpointScheme(WeightSpec(E2M1, scale, None, "float32"), tensors)


def _scale(
    entry: TensorConfig, header: HeaderOf, name: str
) -> tuple[ScaleSpec, tuple[str | int, ...]]:
    """Granularity and axes of scales: as stated, but one number, or one for each channel, where the
    file has it."""
    dtype = "e8m0" if entry.powers else "float32"
    stored = header(name)
    shape = None if stored is None else stored.shape
    if entry.scheme == "per_group":
        return ScaleSpec(dtype, "group", entry.group_size), ("N", "G")
    if entry.scheme == "per_block":
        rows, columns = entry.block
        if rows < 1 or columns < 1:
            raise ConfigError(
                f"{entry.where}.block_size is {list(entry.block)}, expected two positive numbers"
            )
        return ScaleSpec(dtype, "block", columns, rows), ("B", "G")
    number = shape is not None and all(length == 1 for length in shape)
    if number or (shape is None and entry.scheme == "per_tensor"):
        return ScaleSpec(dtype, "tensor"), (1,)
    if shape is not None and len(shape) == 2:
        return ScaleSpec(dtype, "channel"), ("N", "G")
    return ScaleSpec(dtype, "channel"), ("N",)
