# SPDX-License-Identifier: Apache-2.0
"""MLX (``mlx.core.quantize``, ``mlx_lm.utils.quantize_model``): ``quantization`` in config.json.

A quantized module has ``weight``, uint32 words with codes along K in one little-endian bit stream,
and ``scales`` [N, G]. The mode ``affine`` has ``biases`` [N, G] too: ŵ = scale · code + bias. The
modes ``mxfp4``, ``mxfp8`` and ``nvfp4`` have floats as OCP MX and NVFP4 define them, with scales
whose bits are stored as uint8, and no second-level scale.

A module without ``scales`` is not quantized, whatever the configuration says; an entry under its
name gives it settings of its own. Embedding tables are quantized too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.base import Format, register_format
from vllm.compressed_linear.formats.entries import Entries
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.descriptor import ScaleSpec, WeightSpec, ZeroSpec
from vllm.compressed_linear.spec.elements import E2M1, E4M3, ElementType, uint
from vllm.compressed_linear.spec.packing import Packing
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

BITS = (2, 3, 4, 5, 6, 8)
FLOATS: dict[str, tuple[ElementType, str]] = {
    "mxfp4": (E2M1, "e8m0"),
    "mxfp8": (E4M3, "e8m0"),
    "nvfp4": (E2M1, "float8_e4m3fn"),
}
"""Mode → element, and dtype of scales."""
USUAL_GROUP = {"affine": 64, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
"""Mode → channels that share a scale where nothing says how many."""
USUAL_BITS = 4
FIELD = "quantization"


@dataclass(frozen=True)
class Settings:
    """How MLX quantized some modules."""

    mode: str
    bits: int
    group_size: int

    @classmethod
    def parse(cls, fields: Fields, default: Settings | None = None) -> Self:
        """What ``fields`` say, else what ``default`` says, else what MLX does. Raises
        ``ConfigError`` for what MLX does not have."""
        mode = fields.word("mode") or (default.mode if default else "affine")
        if mode not in USUAL_GROUP:
            raise ConfigError(
                f"{fields.where}.mode is {mode!r}, expected one of {', '.join(USUAL_GROUP)}"
            )
        bits = fields.integer("bits", default=default.bits if default else USUAL_BITS)
        if mode == "affine" and bits not in BITS:
            known = ", ".join(map(str, BITS))
            raise ConfigError(f"{fields.where}.bits is {bits}, expected one of {known}")
        usual = default.group_size if default else USUAL_GROUP[mode]
        group = fields.integer("group_size", default=usual)
        if group < 1:
            raise ConfigError(f"{fields.where}.group_size is {group}, expected a positive number")
        return cls(mode, bits, group)

    @property
    def scheme(self) -> CheckpointScheme:
        """The tensors of one module, and what they mean."""
        zero = ZeroSpec("minimum", "float32", negated=True) if self.mode == "affine" else None
        element, scale = FLOATS.get(self.mode, (uint(self.bits), "float32"))
        packing = Packing(element.bits, "K")
        words, bits = "uint32", "" if zero else "uint8"
        tensors = [
            StoredTensor("weight", Role.CODES, "int32", ("N", "K"), packing, written_as=words),
            StoredTensor("scales", Role.SCALE, scale, ("N", "G"), written_as=bits),
        ]
        if zero is not None:
            tensors.append(StoredTensor("biases", Role.ZERO, "float32", ("N", "G")))
        weight = WeightSpec(element, ScaleSpec(scale, "group", self.group_size), zero)
        return CheckpointScheme(weight, tuple(tensors))


class Modules(Entries):
    """Entries under the full name of a module."""

    def selects(self, spelling: str, names: Sequence[str], kind: LayerKind | None) -> bool:
        return spelling in names


@register_format("mlx")
@dataclass(frozen=True)
class Mlx(Format):
    """``quantization`` of MLX. ``overrides``: settings of the modules in ``modules``."""

    aliases = ("mlx",)
    marker_tensors = ("scales",)

    settings: Settings
    modules: Modules
    overrides: dict[str, Fields]

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        overrides = {
            key: Fields.of(value, f"{FIELD}.{key}")
            for key, value in config.items()
            if isinstance(value, Mapping)
        }
        for fields in overrides.values():
            Settings.parse(fields)
        settings = Settings.parse(Fields(config, FIELD))
        return cls(config, settings, Modules.of(FIELD, overrides), overrides)

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        if (found := file.unquantized_on_disk(module)) is not None:
            return found
        if not file.quantized_on_disk(module) and file.tensors_on_disk(module) is not None:
            return Unquantized(f"the checkpoint holds no {module}.scales")
        entry = self.modules.first(file.names_of(module))
        if entry is None:
            return self.settings.scheme
        # What an entry leaves out is MLX's own default, not that of the other modules.
        scheme = Settings.parse(self.overrides[entry]).scheme
        if file.tensors_on_disk(module) is None or file.fits(module, scheme):
            return scheme
        return Settings.parse(self.overrides[entry], self.settings).scheme

    def restated_headers(self, headers: Headers) -> Headers:
        """``headers``. Raises ``ConfigError`` for a file that holds a convolution in MLX's order,
        channels last: mlx_lm adds 1 to the norms of models that have one (``qwen3_5.py``,
        ``qwen3_next.py``: ``sanitize``), which would be taken for what the model's own files hold.
        """
        for name, header in headers.items():
            if name.endswith("conv1d.weight") and header.shape[2:] == (1,):
                raise ConfigError(
                    f"tensor {name} of {header.file} has shape {list(header.shape)}, which is "
                    "MLX's order of a convolution; MLX also changes the norms of such models, "
                    "which is not undone yet. Use a checkpoint of this model in another format"
                )
        return headers
