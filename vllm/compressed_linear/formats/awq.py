# SPDX-License-Identifier: Apache-2.0
"""AWQ as AutoAWQ writes it (``awq/modules/linear/{gemm,gemv,gemv_fast}.py``)."""

from __future__ import annotations

from typing import Any

from vllm.compressed_linear.config import CompressedLinearConfig, ConfigError, register_format
from vllm.compressed_linear.descriptor import CheckpointScheme, ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.layout import Packing, Role, StoredTensor
from vllm.compressed_linear.numerics import uint
from vllm.compressed_linear.resolution import LayerKind, Resolution, Unquantized

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GEMV_WORD_MULTIPLE = {64: 2, 32: 4}
"""AWQ gemv rounds the words of zero points up to this many, by group size; 1 from 128 on."""


def _weight(group_size: int, *, zero: ZeroSpec | None) -> WeightSpec:
    element = uint(4) if zero is not None else uint(4, 8)
    return WeightSpec(element, ScaleSpec("float16", "group", group_size), zero)


def awq_gemm_scheme(group_size: int, *, zero_point: bool) -> CheckpointScheme:
    """The usual AWQ layout: qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N].

    Symmetric files may or may not carry zero points; where they do, the data decides.
    """
    packing = Packing(4, "N", order=AWQ_ORDER)
    zero = ZeroSpec("integer", "uint8")
    return CheckpointScheme(
        _weight(group_size, zero=zero if zero_point else None),
        (
            StoredTensor("qweight", Role.CODES, "int32", ("K", "N"), packing),
            StoredTensor(
                "qzeros", Role.ZERO, "int32", ("G", "N"), packing, optional=not zero_point
            ),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N")),
        ),
    )


def awq_gemv_scheme(group_size: int) -> CheckpointScheme:
    """AWQ gemv: everything packed along K or G in natural order, G rounded up."""
    multiple = 8 * GEMV_WORD_MULTIPLE.get(group_size, 1)
    return CheckpointScheme(
        _weight(group_size, zero=ZeroSpec("integer", "uint8")),
        (
            StoredTensor("qweight", Role.CODES, "int32", ("N", "K"), Packing(4, "K")),
            StoredTensor(
                "qzeros", Role.ZERO, "int32", ("N", "G"), Packing(4, "G"), group_multiple=multiple
            ),
            StoredTensor("scales", Role.SCALE, "float32", ("N", "G"), group_multiple=multiple),
        ),
    )


def awq_gemv_fast_scheme(group_size: int) -> CheckpointScheme:
    """AWQ gemv_fast: four rows interleaved in int16 words, zero points stored as −s·z."""
    multiple = 8 * GEMV_WORD_MULTIPLE.get(group_size, 1)
    return CheckpointScheme(
        _weight(group_size, zero=ZeroSpec("minimum", "float16", negated=True)),
        (
            StoredTensor("qweight", Role.CODES, "int16", ("N", "K"), interleave="awq_gemv_fast"),
            StoredTensor("qzeros", Role.ZERO, "float32", ("G", "N"), group_multiple=multiple),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N"), group_multiple=multiple),
        ),
    )


@register_format("awq")
class AWQConfig(CompressedLinearConfig):
    """``quantization_config`` with ``quant_method: awq``."""

    aliases = ("awq", "auto_awq", "awq_marlin")
    vllm_name = "auto_awq"

    @classmethod
    def parse(cls, config: dict[str, Any]) -> AWQConfig:
        self = cls(config)
        bits = self.require("bits", int, "w_bit")
        if bits != 4:
            raise ConfigError(f"AWQ with {bits} bits (supported: 4)")
        self.group_size = self.require("group_size", int, "q_group_size")
        self.zero_point = bool(config.get("zero_point", True))
        self.version = str(config.get("version") or "gemm").lower()
        if self.version not in ("gemm", "gemv", "gemv_fast"):
            raise ConfigError(f"AWQ version {self.version!r} (supported: gemm, gemv, gemv_fast)")
        self.excluded = list(config.get("modules_to_not_convert") or ())
        return self

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        if str(config.get("version") or "gemm").lower() == "marlin":
            return "AWQ weights that were saved in Marlin's layout"
        return None

    def map_names(self, rename: Any) -> None:
        self.excluded = rename.apply_list(self.excluded)

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        if kind is not LayerKind.LINEAR:
            return Unquantized("AWQ quantizes linear layers only")
        for name in self.excluded:
            if _names_module(name, module):
                return Unquantized(f"modules_to_not_convert: {name}")
        if (found := self.unquantized_on_disk(module, "qweight")) is not None:
            return found
        if self.version == "gemv":
            return awq_gemv_scheme(self.group_size)
        if self.version == "gemv_fast":
            return awq_gemv_fast_scheme(self.group_size)
        return awq_gemm_scheme(self.group_size, zero_point=self.zero_point)


def _names_module(name: str, module: str) -> bool:
    """AutoAWQ excludes a module when the given name is a part of the module's."""
    return name in module
