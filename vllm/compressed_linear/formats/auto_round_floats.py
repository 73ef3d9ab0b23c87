# SPDX-License-Identifier: Apache-2.0
"""AutoRound's exports that are not in GPTQ's or AWQ's layout (auto_round ``export``): MXFP4, MXFP8
and NVFP4 with the tensors of compressed-tensors, fp8, and int8 with int8 inputs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from vllm.compressed_linear.formats.compressed_tensors_arguments import Arguments, activation_of
from vllm.compressed_linear.formats.compressed_tensors_schemes import (
    ZeroForm,
    fp4_scheme,
    fp8_scheme,
    input_tensors,
    int8_scheme,
)
from vllm.compressed_linear.formats.fields import Fields, whole
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.float8 import Names, float8_scheme
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.spec.scheme import CheckpointScheme

PACKINGS = ("llm_compressor", "fp8", "fp8_static", "mx_fp", "mxfp4", "mxfp8", "nv_fp", "nvfp4")
"""Last components of ``packing_format``."""
SCALES = Names(scale=("weight_scale", "weight_scale_inv"))


def is_float(fields: Fields, packing: str) -> bool:
    """Whether a configuration means one of these exports."""
    data_type = fields.word("data_type") or "int"
    return packing.rpartition(":")[2] in PACKINGS or (not packing and data_type != "int")


def float_scheme(fields: Fields, module: str, file: FileView) -> CheckpointScheme | str:
    """How a module is stored with these settings, or what of them is not known."""
    header = partial(file.header, module)
    weights = _arguments(fields, "")
    inputs = _arguments(fields, "act_") if fields.integer("act_bits", default=16) < 16 else None
    if weights is None or (weights.kind == "float" and not weights.symmetric):
        return f"{fields.word('data_type') or 'int'} weights of {fields.integer('bits')} bits"
    activation = None if inputs is None else activation_of(inputs, weights)
    if fields.integer("act_bits", default=16) < 16 and activation is None:
        return f"inputs as {inputs or fields.word('act_data_type')}"
    if weights.kind == "int":
        stored = header("weight_zero_point") is not None
        zeros = ZeroForm.SIGNED if stored or not weights.symmetric else ZeroForm.NONE
        scheme = int8_scheme(weights, header, zeros=zeros, group_index=False)
    elif weights.bits == 4:
        scheme = fp4_scheme(weights, header)
    elif weights.powers:
        scheme = fp8_scheme(weights, header)
    else:
        block = weights.block if weights.strategy == "block" else None
        by_channel = weights.strategy == "channel"
        scheme = float8_scheme(module, file, SCALES, None, block=block, by_channel=by_channel)
    if activation is None:
        return scheme
    tensors = (*scheme.tensors, *input_tensors(activation, header))
    return replace(scheme, activation=activation, tensors=tensors)


def _arguments(fields: Fields, side: str) -> Arguments | None:
    """The settings of weights, or with ``act_`` of inputs; None if their kind is not known."""
    data_type = fields.word(f"{side}data_type") or fields.word("data_type") or "int"
    bits = fields.integer(f"{side}bits")
    symmetric = fields.flag(f"{side}sym")
    dynamic = side == "act_" and fields.flag("act_dynamic") is not False
    base = Arguments(
        f"{fields.where}.{side}bits",
        "int" if data_type.startswith("int") else "float",
        bits,
        "tensor",
        symmetric=True if symmetric is None else symmetric,
        dynamic=dynamic,
    )
    value = fields.values.get(f"{side}group_size")
    if "mx_fp" in data_type and bits in (4, 8):
        size = whole(value) or 32
        return replace(base, strategy="group", group_size=size, powers=True)
    if "nv_fp" in data_type and bits == 4:
        return replace(base, strategy="tensor_group", group_size=whole(value) or 16)
    if bits != 8 or not data_type.startswith(("fp", "int")):
        return None
    return _sized(base, value, f"{fields.where}.{side}group_size", inputs=side == "act_")


def _sized(base: Arguments, value: Any, where: str, *, inputs: bool) -> Arguments:
    """``group_size``: −1 is a channel or token, 0 the tensor, a pair a block."""
    if isinstance(value, list | tuple) and len(value) == 2:
        rows, columns = whole(value[0]), whole(value[1])
        if rows is None or columns is None or rows < 1 or columns < 1:
            raise ConfigError(f"{where} is {value!r}, expected two positive numbers")
        if inputs:
            return replace(base, strategy="group", group_size=columns)
        return replace(base, strategy="block", block=(rows, columns))
    size = -1 if value is None else whole(value)
    if size is None or size < -1:
        raise ConfigError(f"{where} is {value!r}, expected -1, 0, a size, or a pair of sizes")
    if size == 0 or (inputs and not base.dynamic):
        return base
    if size == -1:
        return replace(base, strategy="token" if inputs else "channel")
    return replace(base, strategy="group", group_size=size)
