# SPDX-License-Identifier: Apache-2.0
"""AWQ as AutoAWQ writes it (``awq/modules/linear/{gemm,gemv,gemv_fast,marlin}.py``)."""

from __future__ import annotations

from typing import Any

from vllm.compressed_linear.formats.gptq import marlin_scheme
from vllm.compressed_linear.formats.gptqmodel_dynamic import DynamicRules
from vllm.compressed_linear.formats.resolution import LayerKind, Resolution, Unquantized
from vllm.compressed_linear.integration.config import (
    CompressedLinearConfig,
    ConfigError,
    register_format,
)
from vllm.compressed_linear.spec.descriptor import ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GEMV_WORD_MULTIPLE = {64: 2, 32: 4}
"""AWQ gemv rounds the words of zero points up to this many, by group size; 1 from 128 on."""

VERSIONS = ("gemm", "gemv", "gemv_fast", "marlin")


def _weight(group_size: int, *, zero: ZeroSpec | None) -> WeightSpec:
    element = uint(4) if zero is not None else uint(4, 8)
    return WeightSpec(element, ScaleSpec("float16", "group", group_size), zero)


def awq_gemm_scheme(group_size: int, *, zero_point: bool) -> CheckpointScheme:
    """The usual AWQ layout: qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N].

    Without ``zero_point`` codes mean q − 8; zero points that such a file may hold are all 8.
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


def awq_gemv_fast_scheme(group_size: int, *, zeros: str = "qzeros") -> CheckpointScheme:
    """AWQ gemv_fast: four rows interleaved in int16 words, zero points stored as −s·z under
    the name ``zeros`` ("scaled_zeros" in early releases)."""
    multiple = 8 * GEMV_WORD_MULTIPLE.get(group_size, 1)
    return CheckpointScheme(
        _weight(group_size, zero=ZeroSpec("minimum", "float16", negated=True)),
        (
            StoredTensor("qweight", Role.CODES, "int16", ("N", "K"), interleave="awq_gemv_fast"),
            StoredTensor(zeros, Role.ZERO, "float32", ("G", "N"), group_multiple=multiple),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N"), group_multiple=multiple),
        ),
    )


@register_format("awq")
class AWQConfig(CompressedLinearConfig):
    """``quantization_config`` with ``quant_method: awq``.

    AutoAWQ leaves a module alone when an entry of ``modules_to_not_convert`` is any part of its
    name within its block (``exclude_layers_to_not_quantize``), so ``layers.1.mlp`` excludes nothing
    there, although it would in other readers. Where the file is known, it decides. GPTQModel says
    it in ``dynamic``.
    """

    aliases = ("awq", "auto_awq", "awq_marlin")
    vllm_name = "auto_awq"
    codes_tensors = ("qweight",)

    group_size: int
    zero_point: bool
    version: str
    excluded: list[str]
    dynamic: DynamicRules
    lm_head: bool

    @classmethod
    def parse(cls, config: dict[str, Any]) -> AWQConfig:
        self = cls(config)
        bits = self.require("bits", int, "w_bit")
        if bits != 4:
            raise ConfigError(f"AWQ with {bits} bits (supported: 4)")
        self.group_size = self.require("group_size", int, "q_group_size")
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(
                f"AWQ with group size {self.group_size} (expected -1 or a positive number)"
            )
        self.zero_point = bool(config.get("zero_point", not config.get("sym", False)))
        self.version = awq_version(config)
        if self.version not in VERSIONS:
            raise ConfigError(f"AWQ version {self.version!r} (supported: {', '.join(VERSIONS)})")
        self.excluded = list(config.get("modules_to_not_convert") or ())
        self.dynamic = DynamicRules(config.get("dynamic"))
        self.lm_head = bool(config.get("lm_head", False))
        return self

    def map_names(self, rename: Any) -> None:
        self.excluded = rename.apply_list(self.excluded)

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        if kind is LayerKind.EMBEDDING:
            return Unquantized("AWQ quantizes linear layers only")
        quantized = self.quantized_on_disk(module)
        for name in self.excluded:
            if name in module and not quantized:
                return Unquantized(f"modules_to_not_convert: {name}")
        pattern, override = self.dynamic.find(self.names_of(module))
        if override is None:
            return Unquantized(f"dynamic {pattern}")
        if (found := self.unquantized_on_disk(module)) is not None:
            return found
        if kind is LayerKind.HEAD and not self.lm_head and not quantized:
            return Unquantized("lm_head is not quantized")
        if int(override.get("bits", 4)) != 4:
            raise ConfigError(f"{module}: AWQ with {override['bits']} bits (supported: 4)")
        return self._scheme(module, int(override.get("group_size", self.group_size)))

    def _scheme(self, module: str, group_size: int) -> CheckpointScheme:
        if self.version == "marlin":
            return marlin_scheme(4, group_size, codes="qweight", scale="scales")
        if self.version == "gemv":
            return awq_gemv_scheme(group_size)
        if self.version == "gemv_fast":
            early = "scaled_zeros" in (self.tensors_on_disk(module) or ())
            return awq_gemv_fast_scheme(group_size, zeros="scaled_zeros" if early else "qzeros")
        stored = "qzeros" in (self.tensors_on_disk(module) or ())
        return awq_gemm_scheme(group_size, zero_point=self.zero_point or stored)


def awq_version(config: dict[str, Any]) -> str:
    """AutoAWQ's ``version``, GPTQModel's ``checkpoint_format``, or "gemm"."""
    named = (config.get(key) for key in ("version", "checkpoint_format", "format"))
    return next((str(name).lower() for name in named if name), "gemm")
