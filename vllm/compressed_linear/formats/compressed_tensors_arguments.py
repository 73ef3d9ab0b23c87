# SPDX-License-Identifier: Apache-2.0
"""How compressed-tensors' configurations say that weights or activations are quantized
(compressed_tensors ``quantization/quant_args.py``), and what vLLM computes for activations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

from vllm.compressed_linear.formats.fields import Fields, whole, wrong
from vllm.compressed_linear.formats.float8 import PER_TOKEN, STATIC, per_group
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.spec.activation import nvfp4_input
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import E2M1, uint

_BYTES = ("torch.uint8", "uint8", "torch.float8_e8m0fnu", "float8_e8m0fnu")
"""Words of ``scale_dtype`` for powers of two (MX)."""


@dataclass(frozen=True)
class Arguments:
    """``QuantizationArgs`` of weights, inputs or outputs. ``group_size``: −1 unless ``strategy`` is
    group or tensor_group; ``block``: rows and columns of the block strategy, else (0, 0).
    ``powers``: scales are powers of two (MX). ``where``: the field, for messages."""

    where: str
    kind: str
    bits: int
    strategy: str
    group_size: int = -1
    block: tuple[int, int] = (0, 0)
    symmetric: bool = True
    dynamic: bool = False
    powers: bool = False

    @classmethod
    def read(cls, fields: Fields, *, default_strategy: str = "tensor") -> Self | None:
        """The arguments in a map; None if it is empty. Raises ``ConfigError`` naming the field.

        ``default_strategy``: where there is neither ``strategy`` nor ``group_size``.
        """
        if not fields:
            return None
        size = fields.integer("group_size", default=-1)
        sized = fields.values.get("group_size") is not None
        strategy = fields.word("strategy")
        if not strategy:
            strategy = "group" if sized and size != -1 else "channel" if sized else default_strategy
        grouped = strategy in ("group", "tensor_group")
        if grouped:
            size = fields.integer("group_size")
        if grouped and (size < 1 and not (size == -1 and strategy == "group")):
            raise ConfigError(
                f"{fields.where}.group_size is {size}, expected -1 or a positive number"
            )
        if grouped and size == -1:
            strategy, grouped = "channel", False
        symmetric = fields.flag("symmetric")
        return cls(
            fields.where,
            fields.word("type") or "int",
            fields.integer("num_bits"),
            strategy,
            size if grouped else -1,
            _block(fields) if strategy == "block" else (0, 0),
            True if symmetric is None else symmetric,
            _dynamic(fields),
            fields.word("scale_dtype") in _BYTES,
        )

    def __str__(self) -> str:
        name = f"{self.kind}{self.bits} {'dynamic' if self.dynamic else 'static'}"
        grouped = self.strategy in ("group", "tensor_group")
        sizes = f" of {self.group_size}" if grouped else ""
        return f"{name} per {self.strategy}{sizes}{'' if self.symmetric else ', asymmetric'}"


def activation_of(inputs: Arguments, weights: Arguments) -> ActivationSpec | None:
    """What vLLM computes for activations that are said to be quantized so; None if nothing is known
    of it.

    fp8 inputs with one scale for the whole tensor that is not stored have one for each token, and
    those of weights in blocks one for each group of a block's columns, as in vLLM.
    """
    if inputs.kind == "int":
        return _integers(inputs)
    if inputs.kind != "float" or not inputs.symmetric:
        return None
    if inputs.bits == 8:
        return _fp8(inputs, weights)
    if inputs.bits == 4 and inputs.strategy == "tensor_group":
        return nvfp4_input(inputs.group_size)
    if inputs.bits == 4 and inputs.strategy == "group" and inputs.dynamic:
        # max|x| is rounded to the type's mantissa before its exponent is taken.
        return ActivationSpec(E2M1, True, "group", True, inputs.group_size, "e8m0", 3.5)
    return None


def _integers(inputs: Arguments) -> ActivationSpec | None:
    if inputs.bits not in range(2, 9):
        return None
    grouped = inputs.strategy == "group"
    if inputs.strategy not in (("token", "tensor", "group") if inputs.dynamic else ("tensor",)):
        return None
    middle = 1 << (inputs.bits - 1)
    return ActivationSpec(
        uint(inputs.bits, middle),
        inputs.dynamic,
        inputs.strategy,
        inputs.symmetric,
        inputs.group_size if grouped else -1,
        maximum=float(middle - 1),
    )


def _fp8(inputs: Arguments, weights: Arguments) -> ActivationSpec | None:
    if not inputs.dynamic:
        if inputs.strategy != "tensor":
            return None
        return STATIC
    if inputs.strategy == "group":
        return per_group(inputs.group_size, powers_of_two=inputs.powers)
    if inputs.strategy not in ("token", "tensor"):
        return None
    return per_group(weights.block[1]) if weights.strategy == "block" else PER_TOKEN


def _dynamic(fields: Fields) -> bool:
    """``dynamic`` is true, false, or "local": all scales but a static one of the tensor."""
    value = fields.values.get("dynamic")
    return value == "local" or bool(fields.flag("dynamic"))


def _block(fields: Fields) -> tuple[int, int]:
    """``block_structure``: [rows, columns], or a text such as "128x128"."""
    value: Any = fields.values.get("block_structure")
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", value)):
        value = list(found.groups())
    if isinstance(value, list | tuple) and len(value) == 2:
        rows, columns = whole(value[0]), whole(value[1])
        if rows is not None and columns is not None and rows > 0 and columns > 0:
            return rows, columns
    raise wrong(f"{fields.where}.block_structure", value, "two positive numbers")
