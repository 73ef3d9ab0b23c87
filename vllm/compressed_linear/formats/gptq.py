# SPDX-License-Identifier: Apache-2.0
"""GPTQ as AutoGPTQ and GPTQModel write it: v1, v2 and the bit-plane variant gptq_p.

Layouts: auto_gptq ``qlinear_cuda_old.py``; gptqmodel ``planar_packing.py`` and
``model_dequant.py``.
"""

from __future__ import annotations

import re
from typing import Any

from vllm.compressed_linear.config import CompressedLinearConfig, ConfigError, register_format
from vllm.compressed_linear.descriptor import CheckpointScheme, ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.layout import Packing, Role, StoredTensor, ZeroBump
from vllm.compressed_linear.numerics import uint
from vllm.compressed_linear.resolution import LayerKind, Resolution, Unquantized

PLANES: dict[int, tuple[int, ...]] = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bit planes of gptq_p; its other widths are packed as in gptq."""


def gptq_scheme(
    bits: int, group_size: int, *, version: str, container: str = "int32"
) -> CheckpointScheme:
    """Layout of one GPTQ weight. ``version``: "gptq" (zero points less one), "gptq_v2", "gptq_p".

    Raises ``ConfigError`` for widths the version does not have.
    """
    if bits not in range(2, 9):
        raise ConfigError(f"GPTQ with {bits} bits (supported: 2 to 8)")
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


@register_format("gptq")
class GPTQConfig(CompressedLinearConfig):
    """``quantization_config`` with ``quant_method: gptq``.

    ``dynamic``: an ordered map from regular expressions over module names to overrides; a pattern
    that begins with ``-:`` leaves the module unquantized, ``+:`` is optional. ``desc_act`` and
    ``sym`` are not trusted: the data tells.
    """

    aliases = ("gptq", "auto_gptq", "gptq_marlin")
    vllm_name = "auto_gptq"

    @classmethod
    def parse(cls, config: dict[str, Any]) -> GPTQConfig:
        self = cls(config)
        self.bits = self.require("bits", int)
        self.group_size = self.require("group_size", int)
        self.version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if self.version not in ("gptq", "gptq_v2", "gptq_p"):
            raise ConfigError(
                f"checkpoint_format {self.version!r} (supported: gptq, gptq_v2, gptq_p)"
            )
        self.container = str(config.get("pack_dtype") or "int32")
        self.lm_head = bool(config.get("lm_head", False))
        self.dynamic: dict[str, dict[str, Any]] = config.get("dynamic") or {}
        for pattern in self.dynamic:
            try:
                re.compile(_bare(pattern))
            except re.error as error:
                raise ConfigError(f"dynamic pattern {pattern!r}: {error}") from None
        gptq_scheme(self.bits, self.group_size, version=self.version, container=self.container)
        return self

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if config.get("is_marlin_format") or version == "marlin":
            return "GPTQ weights that were saved in Marlin's layout"
        return None

    def resolve(self, module: str, kind: LayerKind) -> Resolution:
        if kind is LayerKind.EMBEDDING:
            return Unquantized("GPTQ leaves embeddings alone")
        override = self._override(module)
        if override is None:
            return Unquantized("excluded by a dynamic rule")
        if kind is LayerKind.HEAD and not self.lm_head and not override:
            return Unquantized("lm_head is not quantized")
        if (found := self.unquantized_on_disk(module, "qweight")) is not None:
            return found
        return gptq_scheme(
            int(override.get("bits", self.bits)),
            int(override.get("group_size", self.group_size)),
            version=self.version,
            container=str(override.get("pack_dtype", self.container)),
        )

    def _override(self, module: str) -> dict[str, Any] | None:
        """Overrides of the first rule that matches ({}: none does); None: excluded."""
        for pattern, override in self.dynamic.items():
            if re.match(_bare(pattern), module):
                return None if pattern.startswith("-:") else dict(override)
        return {}


def _bare(pattern: str) -> str:
    return pattern[2:] if pattern[:2] in ("-:", "+:") else pattern
