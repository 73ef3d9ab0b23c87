# SPDX-License-Identifier: Apache-2.0
"""GPTQ as AutoGPTQ and GPTQModel write it: v1, v2, the bit-plane variant gptq_p, and Marlin.

Layouts: auto_gptq ``qlinear_cuda_old.py`` and ``qlinear_marlin.py``; gptqmodel
``planar_packing.py`` and ``model_dequant.py``.
"""

from __future__ import annotations

from typing import Any

from vllm.compressed_linear.formats.gptqmodel_dynamic import DynamicRules
from vllm.compressed_linear.formats.resolution import LayerKind, Resolution, Unquantized
from vllm.compressed_linear.integration.config import (
    CompressedLinearConfig,
    ConfigError,
    quant_method_of,
    register_format,
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
    bits: int, group_size: int, *, version: str, container: str = "int32"
) -> CheckpointScheme:
    """Layout of one GPTQ weight. ``version``: "gptq" (zero points less one), "gptq_v2", "gptq_p" or
    "marlin".

    Raises ``ConfigError`` for widths the version does not have.
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
            ),
            StoredTensor("scales", Role.SCALE, "float32", ("G", "N")),
            StoredTensor("g_idx", Role.GROUP_INDEX, "int32", ("K",), optional=True),
        ),
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
    """Which of ``VERSIONS`` (or some unknown one) a GPTQ configuration says; v1 by default."""
    if config.get("is_marlin_format") or quant_method_of(config) == "marlin":
        return "marlin"
    return str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()


@register_format("gptq", "marlin")
class GPTQConfig(CompressedLinearConfig):
    """``quantization_config`` with ``quant_method: gptq``, or ``marlin`` of early AutoGPTQ.

    ``dynamic``: see ``DynamicRules``. ``desc_act`` and ``sym`` are not trusted: the data tells.
    ``modules_in_block_to_quantize`` (parts of names) counts only where the file does not tell.
    """

    aliases = ("gptq", "auto_gptq", "gptq_marlin", "marlin")
    vllm_name = "auto_gptq"
    codes_tensors = ("qweight", "B")

    bits: int
    group_size: int
    version: str
    container: str
    lm_head: bool
    dynamic: DynamicRules
    inside: list[str]

    @classmethod
    def parse(cls, config: dict[str, Any]) -> GPTQConfig:
        self = cls(config)
        self.bits = self.require("bits", int, "w_bit", "wbits")
        null_group = "group_size" in config and config["group_size"] is None
        self.group_size = -1 if null_group else self.require("group_size", int, "q_group_size")
        self.version = gptq_version(config)
        if self.version not in VERSIONS:
            raise ConfigError(
                f"checkpoint_format {self.version!r} (supported: {', '.join(VERSIONS)})"
            )
        self.container = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
        self.lm_head = bool(config.get("lm_head", False))
        self.dynamic = DynamicRules(config.get("dynamic"))
        self.inside = _flat(config.get("modules_in_block_to_quantize"))
        gptq_scheme(self.bits, self.group_size, version=self.version, container=self.container)
        return self

    def map_names(self, rename: Any) -> None:
        self.inside = rename.apply_list(self.inside)

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        if kind is LayerKind.EMBEDDING:
            return Unquantized("GPTQ leaves embeddings alone")
        pattern, override = self.dynamic.find(self.names_of(module))
        if override is None:
            return Unquantized(f"dynamic {pattern}")
        if (found := self.unquantized_on_disk(module)) is not None:
            return found
        if not self.quantized_on_disk(module):
            if kind is LayerKind.HEAD and not self.lm_head and not override:
                return Unquantized("lm_head is not quantized")
            if self.inside and not any(part in module for part in self.inside):
                return Unquantized("not in modules_in_block_to_quantize")
        try:
            return gptq_scheme(
                int(override.get("bits", self.bits)),
                int(override.get("group_size", self.group_size)),
                version=self.version,
                container=str(override.get("pack_dtype", self.container)).removeprefix("torch."),
            )
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"{module}: dynamic {pattern}: {error}") from None


def _flat(names: Any) -> list[str]:
    """A list of names or of lists of them (None: none) → list of names."""
    if isinstance(names, str):
        return [names]
    return [flat for name in names or () for flat in _flat(name)]
