# SPDX-License-Identifier: Apache-2.0
"""GPTQ as AutoGPTQ and GPTQModel write it: v1, v2, the bit-plane variant gptq_p, and Marlin.

Layouts: auto_gptq ``qlinear_cuda_old.py`` and ``qlinear_marlin.py``; gptqmodel
``planar_packing.py`` and ``model_dequant.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from vllm.compressed_linear.formats.base import (
    Format,
    Hints,
    quant_method_of,
    register_format,
)
from vllm.compressed_linear.formats.entries import PartsOfNames
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.gptqmodel_dynamic import GptqModelDynamic
from vllm.compressed_linear.formats.group_size import SIZES, group_size_on_disk
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.descriptor import ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.spec.packing import Packing, ZeroBump
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

PLANES: dict[int, tuple[int, ...]] = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bit planes of gptq_p; its other widths are packed as in gptq."""

VERSIONS = ("gptq", "gptq_v2", "gptq_p", "marlin")
PLAIN = {"qweight", "scales"}
"""Tensors of every version but Marlin's."""
CONTAINERS = ("int8", "int16", "int32", "int64")


def gptq_scheme(
    bits: int, group_size: int, *, version: str, container: str = "int32", symmetric: str = ""
) -> CheckpointScheme:
    """Layout of one GPTQ weight. ``version``: "gptq" (zero points stored minus 1), "gptq_v2",
    "gptq_p" or "marlin". ``symmetric``: as in ``CheckpointScheme``.

    Raises ``ConfigError`` for widths that the version does not support.
    """
    if bits not in range(2, 9):
        raise ConfigError(f"GPTQ with {bits} bits (bits, supported: 2 to 8)")
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"GPTQ with group_size {group_size} (expected -1 or a positive number)")
    if container not in CONTAINERS:
        raise ConfigError(f"pack_dtype {container!r} (supported: {', '.join(CONTAINERS)})")
    if version == "marlin":
        return marlin_scheme(bits, group_size, codes="B", scale="s")
    planes = PLANES.get(bits, ()) if version == "gptq_p" else ()
    if bits in (5, 6, 7) and not planes:
        raise ConfigError(
            f"GPTQ with {bits} bits exists as gptq_p only, but checkpoint_format is {version}"
        )
    bump = ZeroBump.NONE
    if version == "gptq":
        bump = ZeroBump.FIELD if bits == 3 else ZeroBump.WORD
    return CheckpointScheme(
        WeightSpec(
            uint(bits), ScaleSpec("float16", "group", group_size), ZeroSpec("integer", "uint8")
        ),
        (
            StoredTensor(
                "qweight",
                Role.CODES,
                container,
                ("K", "N"),
                Packing(bits, "K", container, planes=planes),
            ),
            StoredTensor(
                "qzeros",
                Role.ZERO,
                container,
                ("G", "N"),
                Packing(bits, "N", container, planes=planes, zero_bump=bump),
                optional=bool(symmetric),
            ),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N")),
            StoredTensor("g_idx", Role.GROUP_INDEX, "int32", ("K",), optional=True),
        ),
        symmetric=symmetric,
    )


def marlin_scheme(bits: int, group_size: int, *, codes: str, scale: str) -> CheckpointScheme:
    """Weights saved in Marlin's layout under the names ``codes`` int32 [K/16, 2·N] and ``scale``
    fp16 [G, N]: symmetric, 4 bits, without activation order."""
    if bits != 4:
        raise ConfigError(
            "Marlin's layout (quant_method or checkpoint_format marlin, or is_marlin_format) with "
            f"{bits} bits (supported: 4)"
        )
    return CheckpointScheme(
        WeightSpec(uint(4, 8), ScaleSpec("float16", "group", group_size)),
        (
            StoredTensor(codes, Role.CODES, "int32", ("N", "K"), interleave="marlin_codes"),
            StoredTensor(scale, Role.SCALE, "float32", ("N", "G"), interleave="marlin_scales"),
        ),
    )


def gptq_version(config: Fields) -> str:
    """The version in a GPTQ configuration, perhaps not one of ``VERSIONS``; v1 by default."""
    if config.flag("is_marlin_format") or quant_method_of(dict(config.values)) == "marlin":
        return "marlin"
    return config.word("checkpoint_format", "format") or "gptq"


@register_format("gptq", "marlin")
@dataclass(frozen=True)
class Gptq(Format):
    """``quantization_config`` with ``quant_method: gptq``, or ``marlin`` of early AutoGPTQ.

    ``dynamic``: see ``GptqModelDynamic``. ``desc_act`` is not trusted: the data decides. ``sym``
    decides only what zero points mean that are the same throughout. ``group_size``: None if it is
    not stated, see ``group_size_on_disk``. ``inside``
    (``modules_in_block_to_quantize``) is used only if the file does not decide.
    """

    aliases = ("gptq", "auto_gptq", "gptq_marlin", "marlin")
    vllm_name = "auto_gptq"
    marker_tensors = ("qweight", "B")

    bits: int
    group_size: int | None
    version: str
    container: str
    symmetric: bool
    reordered: bool
    lm_head: bool
    dynamic: GptqModelDynamic
    inside: PartsOfNames

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        bits = fields.integer("bits", "w_bit", "wbits")
        group_size = fields.optional_integer("group_size", "q_group_size")
        if group_size is None and "group_size" in config:
            group_size = -1
        version = gptq_version(fields)
        symmetric = bool(fields.flag("sym"))
        if version not in VERSIONS and not symmetric:
            raise ConfigError(_unknown_version(version))
        container = fields.word("pack_dtype") or "int32"
        container = container.removeprefix("torch.")
        size = SIZES[0] if group_size is None else group_size
        gptq_scheme(bits, size, version=_layout(version), container=container)
        field = "modules_in_block_to_quantize"
        return cls(
            config,
            bits,
            group_size,
            version,
            container,
            symmetric,
            reordered=bool(fields.flag("desc_act")),
            lm_head=bool(fields.flag("lm_head")),
            dynamic=GptqModelDynamic.parse(fields),
            inside=PartsOfNames.of(field, fields.names(field)),
        )

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        fields = Fields(config)
        version = gptq_version(fields)
        if version not in VERSIONS and not fields.flag("sym"):
            return _unknown_version(version)
        return None

    def hints(self) -> Hints:
        # True by default in AutoGPTQ, GPTQModel and the transformers library.
        symmetric = Fields(self.config).flag("sym") is not False
        return Hints(reordered=self.reordered, symmetric=symmetric)

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        if kind is LayerKind.EMBEDDING:
            return Unquantized("GPTQ does not quantize embeddings")
        names = file.names_of(module)
        pattern, override = self.dynamic.find(names)
        if override is None:
            return Unquantized(f"dynamic {pattern}")
        if (found := file.unquantized_on_disk(module)) is not None:
            return found
        if not file.quantized_on_disk(module):
            if kind is LayerKind.HEAD and not self.lm_head and not override:
                return Unquantized("lm_head is not quantized")
            if self.inside and self.inside.first(names) is None:
                return Unquantized("not in modules_in_block_to_quantize")
        symmetric = self.symmetric if (sym := override.flag("sym")) is None else sym
        if self.version not in VERSIONS:
            stored = file.tensors_on_disk(module)
            if not symmetric or not (PLAIN if stored is None else stored) >= PLAIN:
                return Delegated(_unknown_version(self.version))
        container = override.word("pack_dtype").removeprefix("torch.") or self.container
        try:
            scheme_of = partial(
                gptq_scheme,
                override.integer("bits", default=self.bits),
                version=_layout(self.version),
                container=container,
                symmetric="sym: true" if symmetric else "",
            )
            size = override.optional_integer("group_size")
            if size is None:
                size = self.group_size
            if size is None:
                size = group_size_on_disk(module, file, scheme_of)
            scheme = scheme_of(size)
        except ConfigError as error:
            raise ConfigError(f"{module}: dynamic {pattern}: {error}") from None
        self._check_order(module, override, size, file)
        return scheme

    def _check_order(self, module: str, override: Fields, size: int, file: FileView) -> None:
        """Raise ``ConfigError`` if channels were reordered and the file does not say how."""
        codes, index = file.header(module, "qweight"), file.header(module, "g_idx")
        reordered = override.flag("desc_act")
        reordered = self.reordered if reordered is None else reordered
        if not reordered or size == -1 or codes is None:
            return
        if index is None or 0 in index.shape:
            raise ConfigError(
                f"{module}: desc_act is true, so channels have the order that g_idx says, but "
                f"{codes.file} has no {module}.g_idx; expected one, or "
                "desc_act: false for channels in order"
            )


def _layout(version: str) -> str:
    """The version whose layout a file is taken to have. Words that are not known name kernels, for
    which tools do not repack: the tensors are v1's, or v2's, which symmetric weights do not tell
    apart."""
    return version if version in VERSIONS else "gptq"


def _unknown_version(version: str) -> str:
    return (
        f"checkpoint_format {version!r}, whose zero points are not known (read here: "
        f"{', '.join(VERSIONS)}, and any symmetric weights in their layout)"
    )
