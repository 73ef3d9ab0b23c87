# SPDX-License-Identifier: Apache-2.0
"""AWQ as AutoAWQ writes it (``awq/modules/linear/{gemm,gemv,gemv_fast,marlin}.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from vllm.compressed_linear.formats.base import Format, Hints, register_format, require
from vllm.compressed_linear.formats.entries import PartsOfNames
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.gptq import marlin_scheme
from vllm.compressed_linear.formats.gptqmodel_dynamic import GptqModelDynamic
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.descriptor import ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GEMV_WORD_MULTIPLE = {64: 2, 32: 4}
"""AWQ gemv rounds the number of zero-point words up to a multiple of this, by group size; 1 from
128 on."""

VERSIONS = ("gemm", "gemv", "gemv_fast", "marlin")


INTEGER_ZERO = ZeroSpec("integer", "uint8")


def _weight(group_size: int, zero: ZeroSpec) -> WeightSpec:
    return WeightSpec(uint(4), ScaleSpec("float16", "group", group_size), zero)


def awq_gemm_scheme(group_size: int, *, symmetric: str = "") -> CheckpointScheme:
    """The usual AWQ layout: qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N].

    ``symmetric``: as in ``CheckpointScheme``.
    """
    packing = Packing(4, "N", order=AWQ_ORDER)
    return CheckpointScheme(
        _weight(group_size, INTEGER_ZERO),
        (
            StoredTensor("qweight", Role.CODES, "int32", ("K", "N"), packing),
            StoredTensor(
                "qzeros", Role.ZERO, "int32", ("G", "N"), packing, optional=bool(symmetric)
            ),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N")),
        ),
        symmetric=symmetric,
    )


def awq_gemv_scheme(group_size: int, *, symmetric: str = "") -> CheckpointScheme:
    """AWQ gemv: codes packed along K, zero points along G, in natural order, G rounded up."""
    multiple = 8 * GEMV_WORD_MULTIPLE.get(group_size, 1)
    return CheckpointScheme(
        _weight(group_size, INTEGER_ZERO),
        (
            StoredTensor("qweight", Role.CODES, "int32", ("N", "K"), Packing(4, "K")),
            StoredTensor(
                "qzeros",
                Role.ZERO,
                "int32",
                ("N", "G"),
                Packing(4, "G"),
                optional=bool(symmetric),
                group_multiple=multiple,
            ),
            StoredTensor("scales", Role.SCALE, "float32", ("N", "G"), group_multiple=multiple),
        ),
        symmetric=symmetric,
    )


def awq_gemv_fast_scheme(
    group_size: int, *, zeros: str = "qzeros", symmetric: str = ""
) -> CheckpointScheme:
    """AWQ gemv_fast: four rows interleaved in int16 words, zero points stored as −s·z under
    the name ``zeros`` ("scaled_zeros" in early releases)."""
    multiple = 8 * GEMV_WORD_MULTIPLE.get(group_size, 1)
    return CheckpointScheme(
        _weight(group_size, ZeroSpec("minimum", "float16", negated=True)),
        (
            StoredTensor("qweight", Role.CODES, "int16", ("N", "K"), interleave="awq_gemv_fast"),
            StoredTensor(
                zeros,
                Role.ZERO,
                "float32",
                ("G", "N"),
                optional=bool(symmetric),
                group_multiple=multiple,
            ),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N"), group_multiple=multiple),
        ),
        symmetric=symmetric,
    )


@register_format("awq")
@dataclass(frozen=True)
class Awq(Format):
    """``quantization_config`` with ``quant_method: awq``.

    AutoAWQ excludes a module if an entry of ``modules_to_not_convert`` is a substring of its name
    within its block (``exclude_layers_to_not_quantize``), so ``layers.1.mlp`` excludes nothing
    there, although it does in other readers. If the file is known, it decides. GPTQModel writes
    exclusions to ``dynamic``.
    """

    aliases = ("awq", "auto_awq", "awq_marlin")
    vllm_name = "auto_awq"
    marker_tensors = ("qweight",)

    group_size: int
    symmetric: str
    version: str
    excluded: PartsOfNames
    dynamic: GptqModelDynamic
    lm_head: bool

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        bits = require(config, "bits", int, "w_bit")
        if bits != 4:
            raise ConfigError(f"AWQ with {bits} bits (supported: 4)")
        group_size = require(config, "group_size", int, "q_group_size")
        if group_size != -1 and group_size < 1:
            raise ConfigError(
                f"AWQ with group size {group_size} (expected -1 or a positive number)"
            )
        version = awq_version(config)
        if version not in VERSIONS:
            raise ConfigError(f"AWQ version {version!r} (supported: {', '.join(VERSIONS)})")
        field = "modules_to_not_convert"
        return cls(
            config,
            group_size,
            symmetric=_symmetric(config),
            version=version,
            excluded=PartsOfNames.of(field, config.get(field) or ()),
            dynamic=GptqModelDynamic.parse(config.get("dynamic")),
            lm_head=bool(config.get("lm_head", False)),
        )

    def hints(self) -> Hints:
        return Hints(symmetric=bool(self.symmetric or self.config.get("sym")))

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        if kind is LayerKind.EMBEDDING:
            return Unquantized("AWQ quantizes linear layers only")
        names, quantized = file.names_of(module), file.quantized_on_disk(module)
        if not quantized and (entry := self.excluded.first(names)) is not None:
            return Unquantized(f"{self.excluded.field}: {entry}")
        pattern, override = self.dynamic.find(names)
        if override is None:
            return Unquantized(f"dynamic {pattern}")
        if (found := file.unquantized_on_disk(module)) is not None:
            return found
        if kind is LayerKind.HEAD and not self.lm_head and not quantized:
            return Unquantized("lm_head is not quantized")
        if int(override.get("bits", 4)) != 4:
            raise ConfigError(f"{module}: AWQ with {override['bits']} bits (supported: 4)")
        group_size = int(override.get("group_size", self.group_size))
        symmetric = self.symmetric
        if (sym := override.get("sym")) is not None:
            symmetric = "sym: true" if sym else ""
        return self._scheme(group_size, symmetric, file.tensors_on_disk(module) or set())

    def _scheme(self, group_size: int, symmetric: str, on_disk: set[str]) -> CheckpointScheme:
        if self.version == "marlin":
            return marlin_scheme(4, group_size, codes="qweight", scale="scales")
        if self.version == "gemv":
            return awq_gemv_scheme(group_size, symmetric=symmetric)
        if self.version == "gemv_fast":
            zeros = "scaled_zeros" if "scaled_zeros" in on_disk else "qzeros"
            return awq_gemv_fast_scheme(group_size, zeros=zeros, symmetric=symmetric)
        return awq_gemm_scheme(group_size, symmetric=symmetric)


def _symmetric(config: dict[str, Any]) -> str:
    """AutoAWQ's ``zero_point``, or GPTQModel's ``sym``, where they say that there are none."""
    if config.get("zero_point") is not None:
        return "" if config["zero_point"] else "zero_point: false"
    return "sym: true" if config.get("sym") else ""


def awq_version(config: dict[str, Any]) -> str:
    """AutoAWQ's ``version``, GPTQModel's ``checkpoint_format``, or "gemm"."""
    named = (config.get(key) for key in ("version", "checkpoint_format", "format"))
    return next((str(name).lower() for name in named if name), "gemm")
