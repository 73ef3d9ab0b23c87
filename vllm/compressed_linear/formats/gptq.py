# SPDX-License-Identifier: Apache-2.0
"""GPTQ as AutoGPTQ and GPTQModel write it: v1, v2, the bit-plane variant gptq_p, and Marlin.

Layouts: auto_gptq ``qlinear_cuda_old.py`` and ``qlinear_marlin.py``; gptqmodel
``planar_packing.py`` and ``model_dequant.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from vllm.compressed_linear.formats.base import (
    Format,
    Hints,
    quant_method_of,
    register_format,
    require,
)
from vllm.compressed_linear.formats.entries import PartsOfNames
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.gptqmodel_dynamic import GptqModelDynamic
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
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
CONTAINERS = ("int8", "int16", "int32", "int64")


def gptq_scheme(
    bits: int, group_size: int, *, version: str, container: str = "int32", symmetric: str = ""
) -> CheckpointScheme:
    """Layout of one GPTQ weight. ``version``: "gptq" (zero points stored minus 1), "gptq_v2",
    "gptq_p" or "marlin". ``symmetric``: as in ``CheckpointScheme``.

    Raises ``ConfigError`` for widths that the version does not support.
    """
    if bits not in range(2, 9):
        raise ConfigError(f"GPTQ with {bits} bits (supported: 2 to 8)")
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"GPTQ with group size {group_size} (expected -1 or a positive number)")
    if container not in CONTAINERS:
        raise ConfigError(f"pack_dtype {container!r} (supported: {', '.join(CONTAINERS)})")
    if version == "marlin":
        return marlin_scheme(bits, group_size, codes="B", scale="s")
    planes = PLANES.get(bits, ()) if version == "gptq_p" else ()
    if bits in (5, 6, 7) and not planes:
        raise ConfigError(f"GPTQ with {bits} bits exists as gptq_p only, but the file is {version}")
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
        raise ConfigError(f"Marlin's layout with {bits} bits (supported: 4)")
    return CheckpointScheme(
        WeightSpec(uint(4, 8), ScaleSpec("float16", "group", group_size)),
        (
            StoredTensor(codes, Role.CODES, "int32", ("N", "K"), interleave="marlin_codes"),
            StoredTensor(scale, Role.SCALE, "float32", ("N", "G"), interleave="marlin_scales"),
        ),
    )


def gptq_version(config: dict[str, Any]) -> str:
    """The version in a GPTQ configuration, perhaps not one of ``VERSIONS``; v1 by default."""
    if config.get("is_marlin_format") or quant_method_of(config) == "marlin":
        return "marlin"
    return str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()


@register_format("gptq", "marlin")
@dataclass(frozen=True)
class Gptq(Format):
    """``quantization_config`` with ``quant_method: gptq``, or ``marlin`` of early AutoGPTQ.

    ``dynamic``: see ``GptqModelDynamic``. ``desc_act`` is not trusted: the data decides. ``sym``
    decides only what zero points mean that are the same throughout. ``inside``
    (``modules_in_block_to_quantize``) is used only if the file does not decide.
    """

    aliases = ("gptq", "auto_gptq", "gptq_marlin", "marlin")
    vllm_name = "auto_gptq"
    marker_tensors = ("qweight", "B")

    bits: int
    group_size: int
    version: str
    container: str
    lm_head: bool
    dynamic: GptqModelDynamic
    inside: PartsOfNames

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        bits = require(config, "bits", int, "w_bit", "wbits")
        null_group = "group_size" in config and config["group_size"] is None
        group_size = -1 if null_group else require(config, "group_size", int, "q_group_size")
        version = gptq_version(config)
        if version not in VERSIONS:
            raise ConfigError(f"checkpoint_format {version!r} (supported: {', '.join(VERSIONS)})")
        container = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
        gptq_scheme(bits, group_size, version=version, container=container)
        field = "modules_in_block_to_quantize"
        return cls(
            config,
            bits,
            group_size,
            version,
            container,
            lm_head=bool(config.get("lm_head", False)),
            dynamic=GptqModelDynamic.parse(config.get("dynamic")),
            inside=PartsOfNames.of(field, _flat(config.get(field))),
        )

    def hints(self) -> Hints:
        return Hints(
            reordered=bool(self.config.get("desc_act")), symmetric=bool(self.config.get("sym"))
        )

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
        try:
            return gptq_scheme(
                int(override.get("bits", self.bits)),
                int(override.get("group_size", self.group_size)),
                version=self.version,
                container=str(override.get("pack_dtype", self.container)).removeprefix("torch."),
                symmetric="sym: true" if override.get("sym", self.config.get("sym")) else "",
            )
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"{module}: dynamic {pattern}: {error}") from None


def _flat(names: Any) -> list[str]:
    """Flatten a list of names or of lists of names (None: empty)."""
    if isinstance(names, str):
        return [names]
    return [flat for name in names or () for flat in _flat(name)]
