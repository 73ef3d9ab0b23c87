# SPDX-License-Identifier: Apache-2.0
"""Contents of a checkpoint's files, which have precedence over its configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import (
    NATURAL_DTYPES,
    Headers,
    last_word,
    numbered_layer,
)
from vllm.compressed_linear.formats.entries import ModuleNames, Rename
from vllm.compressed_linear.formats.resolution import ConfigError, Resolution, Unquantized
from vllm.compressed_linear.formats.shapes import has_shape, possible_shapes
from vllm.compressed_linear.spec.scheme import CheckpointScheme

OUTER_NAMES = ("draft_model", "language_model")
"""Names that vLLM puts before those of a checkpoint; they count where no file is known."""

ATTENTION_SCALES = frozenset({"kv_scale", "k_scale", "v_scale"})
"""Scales of the key-value cache, by the names that vLLM knows (``get_cache_scale_mapper``)."""

SCALES = frozenset({"weight_scale", "weight_scale_inv"})
"""Scales of codes that are called ``weight``: next to a plain one they say that it is damaged."""

_LIST_TWICE = re.compile(r"\.(\w+)\.(\d+)\.\1\.")
"""A list whose name follows the index in it once more."""


@dataclass(frozen=True)
class FileView:
    """Headers of the files under vLLM's names; ``FileView()`` if no file is known.

    ``disk_names``: vLLM's name of a module → the checkpoint's, where they differ.
    ``marker_tensors``: last components of tensor names that only quantized modules have.
    ``packed``: a model's ``packed_modules_mapping``, last component of a fused layer's name → those
    of its members.
    """

    headers: Headers | None = None
    marker_tensors: tuple[str, ...] = ()
    disk_names: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> FileView:
        """A copy for a config of its own, which changes nothing but ``packed``."""
        return replace(self, packed=copy.deepcopy(self.packed, memo))

    def renamed(self, rename: Rename) -> FileView:
        """The same file with names mapped by ``rename``; unmapped tensors keep theirs."""
        if self.headers is None:
            return self
        names = {name: new for name in self.headers if (new := rename(name))}
        modules = {k.rpartition(".")[0]: v.rpartition(".")[0] for k, v in names.items()}
        disk_names = {
            new: self.disk_names.get(old, old) for old, new in modules.items() if old != new
        }
        return replace(
            self,
            headers=self.headers.renamed(names),
            disk_names={**self.disk_names, **disk_names},
        )

    @property
    def modules(self) -> Mapping[str, set[str]]:
        """Module → last components of its tensors' names; empty if no file is known."""
        return {} if self.headers is None else self.headers.modules

    def stored_as(self, module: str) -> str:
        """The module under whose name the file has the tensors of ``module``; itself if none is.

        vLLM puts names of its own before those of a drafter or of a language model in a larger one,
        and counts the layers of a drafter on from the target's. Where a model has no values, keys
        are its values (``attention_k_eq_v``). Whisper's decoder says
        ``decoder.layers.0.layers.fc1`` to ``model.decoder.layers.0.fc1``.
        """
        if self.headers is None or module in self.modules:
            return module
        parts = module.split(".")
        for first in range(1, len(parts)):
            if (name := ".".join(parts[first:])) in self.modules:
                return name
        numbers = [at for at, part in enumerate(parts) if part.isdigit()]
        if numbers and self._only_layer.rpartition(".")[2] not in ("", parts[numbers[0]]):
            name = f"{self._only_layer}.{'.'.join(parts[numbers[0] + 1 :])}"
            if name in self.modules:
                return name
        plain = _LIST_TWICE.sub(r".\1.\2.", f".{module}")
        if plain != f".{module}":
            found = [name for name in self.modules if f".{name}".endswith(plain)]
            if len(found) == 1:
                return found[0]
        parent, dot, last = module.rpartition(".")
        if last == "v_proj" and self.stored_as(keys := f"{parent}{dot}k_proj") in self.modules:
            return self.stored_as(keys)
        return module

    @cached_property
    def _only_layer(self) -> str:
        """The name of the file's only layer (a number, or ``midlayer``, is its last part); empty if
        it has none or several."""
        layers = set()
        for module in self.modules:
            parts = module.split(".")
            ends = (at for at, part in enumerate(parts) if part.isdigit() or part == "midlayer")
            if (end := next(ends, None)) is not None:
                layers.add(".".join(parts[: end + 1]))
        return layers.pop() if len(layers) == 1 else ""

    def names_of(self, module: str) -> ModuleNames:
        """Names of ``module`` with which entries of a configuration are compared.

        vLLM's, and where they differ, the checkpoint's: a model renames its weights, and regular
        expressions were written for the latter. And the layers in which vLLM fuses it.
        """
        stored = self.stored_as(module)
        names = [module, stored, self.disk_names.get(stored, stored)]
        if self.headers is None:
            names += [module.removeprefix(f"{outer}.") for outer in OUTER_NAMES]
        fused = {}
        for name in names:
            parent, dot, last = name.rpartition(".")
            for layer, members in self.packed.items():
                if last in members and layer not in members:
                    fused[f"{parent}{dot}{layer}"] = [f"{parent}{dot}{m}" for m in members]
        return ModuleNames(dict.fromkeys(names), fused)

    def tensors_on_disk(self, module: str) -> set[str] | None:
        """Last components of the names of the module's tensors; None if the file does not say."""
        return self.modules.get(self.stored_as(module))

    def header(self, module: str, tensor: str) -> TensorHeader | None:
        """Dtype and shape of a tensor of the module; None if it is not there, or the file is not
        known."""
        if self.headers is None:
            return None
        return self.headers.get(f"{self.stored_as(module)}.{tensor}")

    def fits(self, module: str, scheme: CheckpointScheme) -> bool:
        """Whether the tensors of the module can be those of ``scheme``, by their shapes."""
        found = {t.name: self.header(module, t.name) for t in scheme.tensors}
        if any(found[t.name] is None and not t.optional for t in scheme.tensors):
            return False
        known = [(t, h) for t in scheme.tensors if (h := found[t.name]) is not None]
        shape = self._shape_on_disk(module)
        shapes = [shape] if shape else possible_shapes(scheme, known)
        return any(has_shape(scheme, known, n, k) for n, k in shapes)

    def _shape_on_disk(self, module: str) -> tuple[int, int] | None:
        """[N, K] by the file's ``weight_shape``, for formats that have one."""
        header, stored = self.header(module, "weight_shape"), self.stored_as(module)
        if header is None or not Path(header.file).is_file():
            return None
        name = f"{self.disk_names.get(stored, stored)}.weight_shape"
        try:
            with safe_open(header.file, framework="pt") as file:
                n, k = (int(length) for length in file.get_tensor(name))
        except (SafetensorError, OSError, RuntimeError, ValueError):
            return None  # RuntimeError: the file is too large to be mapped
        return n, k

    def quantized_on_disk(self, module: str) -> bool:
        """Whether the file is known to hold codes for ``module``."""
        return self.stored_as(module) in self.quantized_modules

    @property
    def quantized_modules(self) -> Collection[str]:
        """Modules for which the file is known to hold codes, in its order."""
        if self.headers is None:
            return ()
        return self.headers.holding(self.marker_tensors).modules

    def unquantized_on_disk(self, module: str) -> Unquantized | None:
        """``Unquantized`` if the file has a float ``weight`` for ``module`` and neither codes nor
        scales, or has its name only under other parents (models rename while they load) and never
        with codes."""
        if self.headers is None:
            return None
        found = self.tensors_on_disk(module)
        if found is None:
            name = last_word(module)
            if self._quantized_by_last_word.get(name) is False:
                return Unquantized(f"no {name} of the checkpoint is quantized")
            return None
        if "weight" not in found or self.quantized_on_disk(module) or found & SCALES:
            return None
        header = self.header(module, "weight")
        if header is None or header.dtype not in ("bfloat16", "float16", "float32"):
            return None
        return Unquantized(f"the checkpoint holds a plain {module}.weight")

    def rows(self, module: str, resolution: Resolution) -> int | None:
        """Number of rows (output channels) of the module's weight; None if the file does not say,
        for example of packed codes alone."""
        if self.headers is None:
            return None
        if not isinstance(resolution, CheckpointScheme):
            weight = self.header(module, "weight")
            return weight.shape[0] if weight is not None and weight.shape else None
        for stored in resolution.tensors:
            found = self.headers.get(f"{module}.{stored.name}")
            packed = stored.packing is not None and stored.packing.axis == "N"
            if (
                found is None
                or packed
                or stored.interleave
                or stored.flat
                or "N" not in stored.axes
            ):
                continue
            if len(found.shape) == len(stored.axes):
                return found.shape[stored.axes.index("N")]
        return None

    def dtypes(self, module: str, resolution: Resolution) -> dict[str, str]:
        """dtypes of the module's tensors that the file has, by the last component of their names:
        torch's names, as in a header."""
        if not isinstance(resolution, CheckpointScheme):
            return {}
        found = {t.name: self.header(module, t.name) for t in resolution.tensors}
        return {name: header.dtype for name, header in found.items() if header is not None}

    def check_against_file(self, layer: str, module: str, resolution: Resolution) -> None:
        """Raise ``ConfigError`` if the configuration contradicts the tensors of the file."""
        found = self.tensors_on_disk(module)
        if found is None or self.headers is None:
            return
        if isinstance(resolution, Unquantized):
            weight = self.header(module, "weight")
            if weight is not None and weight.dtype not in NATURAL_DTYPES:
                raise ConfigError(
                    f"{layer}: tensor {module}.weight of {weight.file} is {weight.dtype}, but "
                    f"{module} is unquantized ({resolution.reason}), expected one of "
                    f"{', '.join(sorted(NATURAL_DTYPES))}"
                )
            codes = sorted(found & set(self.marker_tensors))
            if codes:
                tensor = f"{self.stored_as(module)}.{codes[0]}"
                raise ConfigError(
                    f"{layer}: the configuration leaves {module} unquantized "
                    f"({resolution.reason}), but {self.headers[tensor].file} holds {tensor}"
                )
        elif isinstance(resolution, CheckpointScheme):
            needed = [t.name for t in resolution.tensors if not t.optional]
            missing = [name for name in needed if name not in found]
            if missing:
                file = self.headers[f"{self.stored_as(module)}.{min(found)}"].file
                raise ConfigError(
                    f"{layer}: tensor {module}.{missing[0]} is not in the checkpoint; {resolution} "
                    f"needs {', '.join(needed)}, but {file} holds {', '.join(sorted(found))}"
                )

    def only_table(self) -> str:
        """The file's name of its embedding table, for models that do not name theirs; empty if
        there are several or the file is not known."""
        tables = [m for m in self.modules if re.search(r"emb|wte", last_word(m))]
        found = [m for m in tables if self.quantized_on_disk(m)] or tables
        return found[0] if len(found) == 1 else ""

    def has_attention_scales(self) -> bool:
        """Whether a module has a scale of the key-value cache."""
        return self.headers is not None and not ATTENTION_SCALES.isdisjoint(self.headers.last_words)

    def lacks(self, tensor: str) -> bool:
        """Whether the file is known and no module has a tensor of this name."""
        return self.headers is not None and tensor not in self.headers.last_words

    def may_have(self, module: str) -> bool:
        """Whether the file has a module with this last component, or is not known."""
        last = module.rpartition(".")[2]
        return not self.modules or any(m.rpartition(".")[2] == last for m in self.modules)

    def experts_quantized(self, layer: str) -> bool | None:
        """Whether the file holds codes for an expert of ``layer``; None when it does not say.

        Some models store the experts fused, as siblings of the layer, so only a parent without
        any codes means "no". Others are built under a name that their tensors do not have.
        """
        if self.headers is None:
            return None
        holding = self.headers.holding(self.marker_tensors)
        for parent in (layer, layer.rpartition(".")[0]):
            quantized = holding.inside.get(parent)
            if quantized is not None and (parent == layer or not quantized):
                return quantized
        return holding.experts.get(numbered_layer(layer))

    @cached_property
    def _quantized_by_last_word(self) -> Mapping[str, bool]:
        """Last word of modules' names → whether the file holds codes for one of them."""
        found = dict.fromkeys(map(last_word, self.modules), False)
        return found | dict.fromkeys(map(last_word, self.quantized_modules), True)
