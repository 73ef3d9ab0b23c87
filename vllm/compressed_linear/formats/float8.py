# SPDX-License-Identifier: Apache-2.0
"""Weights of 8-bit floats called ``weight``, with scales next to them: what the file says of them.

The shape of the scales tells how many rows and channels share one, so a file is read as it is, even
if its configuration says something else. A weight of a fused layer keeps the scales of each of its
members.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.spec.activation import JUST_ABOVE_224
from vllm.compressed_linear.spec.descriptor import ActivationSpec, ScaleSpec, WeightSpec
from vllm.compressed_linear.spec.elements import E4M3, E5M2
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

STATIC = ActivationSpec(E4M3, False, "tensor", maximum=448.0)
"""x in e4m3 with a scale of the file."""
PER_TOKEN = replace(STATIC, dynamic=True, granularity="token")

_POWERS_OF_TWO = {"uint8": "e8m0", "float8_e8m0fnu": "e8m0"}


def per_group(size: int, *, powers_of_two: bool = False) -> ActivationSpec:
    """x in e4m3 with a dynamic scale for ``size`` channels of a token."""
    spec = replace(PER_TOKEN, granularity="group", group_size=size)
    return replace(spec, scale_dtype="e8m0", maximum=JUST_ABOVE_224) if powers_of_two else spec


@dataclass(frozen=True)
class Names:
    """Names that a format gives its tensors, the first of each as long as no file is known.
    ``scale``: of the weight. ``input``: of the static scale of x."""

    scale: tuple[str, ...] = ("weight_scale",)
    input: tuple[str, ...] = ("input_scale",)


def float8_scheme(
    module: str,
    file: FileView,
    names: Names,
    activation: ActivationSpec | None,
    *,
    block: tuple[int, int] | None = None,
    by_channel: bool = False,
    reciprocal: bool = False,
) -> CheckpointScheme:
    """The scheme of ``module``, as its tensors in the file are, or else as the arguments say.

    ``block``: rows and channels that share a scale. ``by_channel``: each row has one.
    ``reciprocal``: scales are divisors.
    """
    weight = file.header(module, "weight")
    name = _present(module, file, names.scale)
    scale = file.header(module, name)
    five = weight is not None and weight.dtype == "float8_e5m2"
    axes = _axes(weight, scale, block)
    if axes is None:
        axes = ("B", "G") if block else ("N", 1) if by_channel else (1,)
    granularity = "channel"
    if "B" in axes and block:
        granularity = "block"
    elif "N" not in axes:
        granularity = "tensor"
    rows, channels = block if block and "B" in axes else (1, -1)
    dtype = "float32" if scale is None else _POWERS_OF_TWO.get(scale.dtype, "float32")
    if scale is not None and scale.dtype == "uint8" and "B" not in axes:
        dtype = "float32"  # only scales of blocks are stored as bytes
    tensors = [
        StoredTensor("weight", Role.CODES, "float8_e5m2" if five else "float8_e4m3fn", ("N", "K")),
        StoredTensor(name, Role.SCALE, dtype, axes, reciprocal=reciprocal),
    ]
    if activation is not None and activation.needs_scale:
        given = _present(module, file, names.input)
        tensors.append(StoredTensor(given, Role.INPUT_SCALE, "float32", (1,)))
    elif has_input_scale(module, file, names):
        given = _present(module, file, names.input)
        tensors.append(StoredTensor(given, Role.IGNORED, "float32", (1,), optional=True))
    return CheckpointScheme(
        WeightSpec(E5M2 if five else E4M3, ScaleSpec(dtype, granularity, channels, rows)),
        tuple(tensors),
        activation,
    )


def has_input_scale(module: str, file: FileView, names: Names) -> bool | None:
    """Whether the file has a static scale of x for ``module``; None if it does not say."""
    found = file.tensors_on_disk(module)
    return None if found is None else not found.isdisjoint(names.input)


def _present(module: str, file: FileView, names: tuple[str, ...]) -> str:
    """The first of ``names`` that the module has in the file, or else any module, or the first of
    all."""
    found = file.tensors_on_disk(module) or set()
    present = [name for name in names if name in found]
    present += [name for name in names if file.headers is not None and not file.lacks(name)]
    return present[0] if present else names[0]


def _axes(
    weight: TensorHeader | None, scale: TensorHeader | None, block: tuple[int, int] | None
) -> tuple[str | int, ...] | None:
    """The axes of scales of this shape; None if it does not tell. One number in as many dimensions
    as blocks have is what is left of them, unless there is one block."""
    if weight is None or scale is None or len(weight.shape) != 2:
        return None
    n, k = weight.shape
    if block is not None:
        grid = (-(-n // block[0]), -(-k // block[1]))
        if scale.shape == grid:
            return ("B", "G")
        if scale.shape == (grid[0], 1, grid[1], 1):
            return ("B", 1, "G", 1)
        if len(scale.shape) > 1 and all(length == 1 for length in scale.shape):
            return None
    if scale.shape in ((n,), (n, 1)) and n > 1:
        return ("N",) if len(scale.shape) == 1 else ("N", 1)
    if all(length == 1 for length in scale.shape):
        return (1,)
    return None
