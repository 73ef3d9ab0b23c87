# SPDX-License-Identifier: Apache-2.0
"""AWQ as AutoAWQ writes it (``awq/modules/linear/{gemm,gemv,gemv_fast,marlin}.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from vllm.compressed_linear.formats.base import Format, Hints, register_format
from vllm.compressed_linear.formats.entries import PartsOfNames
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.gptq import marlin_scheme
from vllm.compressed_linear.formats.gptqmodel_dynamic import GptqModelDynamic
from vllm.compressed_linear.formats.group_size import group_size_on_disk
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
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
    exclusions to ``dynamic``. ``group_size``: None if it is not stated, see ``group_size_on_disk``.
    """

    aliases = ("awq", "auto_awq", "awq_marlin")
    vllm_name = "auto_awq"
    marker_tensors = ("qweight",)

    group_size: int | None
    symmetric: str
    version: str
    excluded: PartsOfNames
    dynamic: GptqModelDynamic
    lm_head: bool

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        bits = fields.integer("bits", "w_bit")
        if bits != 4:
            raise ConfigError(f"AWQ with {bits} bits (supported: 4)")
        group_size = fields.optional_integer("group_size", "q_group_size")
        if group_size is not None:
            checked_group(group_size)
        field = "modules_to_not_convert"
        return cls(
            config,
            group_size,
            symmetric=_symmetric(fields),
            version=awq_version(fields),
            excluded=PartsOfNames.of(field, fields.names(field)),
            dynamic=GptqModelDynamic.parse(fields),
            lm_head=bool(fields.flag("lm_head")),
        )

    def hints(self) -> Hints:
        return Hints(symmetric=bool(self.symmetric or Fields(self.config).flag("sym")))

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
        bits = override.integer("bits", default=4)
        if bits != 4:
            raise ConfigError(f"{module}: AWQ with {bits} bits (supported: 4)")
        symmetric = self.symmetric
        if (sym := override.flag("sym")) is not None:
            symmetric = "sym: true" if sym else ""
        version = self.version if self.version in VERSIONS else _version_on_disk(module, file)
        if not version:
            return Delegated(
                f"AWQ version {self.version!r} (read here: {', '.join(VERSIONS)}, and others whose "
                "tensors have the shapes of one of these)"
            )
        zeros = "scaled_zeros" if "scaled_zeros" in (file.tensors_on_disk(module) or ()) else ""
        scheme_of = partial(_scheme, version, symmetric, zeros or "qzeros")
        group_size = override.optional_integer("group_size")
        if group_size is None:
            group_size = self.group_size
        if group_size is None:
            group_size = group_size_on_disk(module, file, scheme_of)
        return scheme_of(checked_group(group_size))


def _scheme(version: str, symmetric: str, zeros: str, group_size: int) -> CheckpointScheme:
    if version == "marlin":
        return marlin_scheme(4, group_size, codes="qweight", scale="scales")
    if version == "gemv":
        return awq_gemv_scheme(group_size, symmetric=symmetric)
    if version == "gemv_fast":
        return awq_gemv_fast_scheme(group_size, zeros=zeros, symmetric=symmetric)
    return awq_gemm_scheme(group_size, symmetric=symmetric)


def checked_group(group_size: int) -> int:
    """``group_size``. Raises ``ConfigError`` for one that AWQ does not have."""
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"AWQ with group_size {group_size} (expected -1 or a positive number)")
    return group_size


def _version_on_disk(module: str, file: FileView) -> str:
    """The version by dtype and shapes of the module's tensors; empty if they do not tell.

    Other words than the versions name kernels (``exllama``, ``ipex``), for which tools do not
    repack.
    """
    codes, scales = (file.header(module, name) for name in ("qweight", "scales"))
    if codes is None or scales is None or len(codes.shape) != 2 or len(scales.shape) != 2:
        return ""
    if codes.dtype == "int16":
        return "gemv_fast"
    if scales.shape[1] == 8 * codes.shape[1]:
        return "gemm"
    return "gemv" if scales.shape[0] == codes.shape[0] else ""


def _symmetric(config: Fields) -> str:
    """AutoAWQ's ``zero_point``, or GPTQModel's ``sym``, where they say that there are none."""
    zero_point = config.flag("zero_point")
    if zero_point is not None:
        return "" if zero_point else "zero_point: false"
    return "sym: true" if config.flag("sym") else ""


def awq_version(config: Fields) -> str:
    """AutoAWQ's ``version``, GPTQModel's ``checkpoint_format``, or "gemm"."""
    return config.word("version", "checkpoint_format", "format") or "gemm"
