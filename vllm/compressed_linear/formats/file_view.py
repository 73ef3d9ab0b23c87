# SPDX-License-Identifier: Apache-2.0
"""Contents of a checkpoint's files, which have precedence over its configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from vllm.compressed_linear.checkpoint.headers import Headers, last_word
from vllm.compressed_linear.formats.entries import Rename
from vllm.compressed_linear.formats.resolution import ConfigError, Resolution, Unquantized
from vllm.compressed_linear.spec.scheme import CheckpointScheme


@dataclass(frozen=True)
class FileView:
    """Headers of the files under vLLM's names; ``FileView()`` if no file is known.

    ``disk_names``: vLLM's name of a module → the checkpoint's, where they differ.
    ``marker_tensors``: last components of tensor names that only quantized modules have.
    """

    headers: Headers | None = None
    marker_tensors: tuple[str, ...] = ()
    disk_names: Mapping[str, str] = field(default_factory=dict)

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

    def names_of(self, module: str) -> tuple[str, ...]:
        """vLLM's name of ``module`` and, where a model renames its weights, the checkpoint's.

        Regular expressions of a configuration were written for the latter.
        """
        other = self.disk_names.get(module, module)
        return (module,) if other == module else (module, other)

    def tensors_on_disk(self, module: str) -> set[str] | None:
        """Last components of the names of the module's tensors; None if the file does not say."""
        return self.modules.get(module)

    def quantized_on_disk(self, module: str) -> bool:
        """Whether the file is known to hold codes for ``module``."""
        return bool((self.tensors_on_disk(module) or set()) & set(self.marker_tensors))

    def unquantized_on_disk(self, module: str) -> Unquantized | None:
        """``Unquantized`` if the file has a float ``weight`` for ``module`` and no codes, or has
        its name only under other parents (models rename while they load) and never with codes."""
        if self.headers is None:
            return None
        found = self.tensors_on_disk(module)
        if found is None:
            name = last_word(module)
            same_name = [m for m in self.modules if last_word(m) == name]
            if same_name and not any(self.quantized_on_disk(m) for m in same_name):
                return Unquantized(f"no {name} of the checkpoint is quantized")
            return None
        if "weight" not in found or self.quantized_on_disk(module):
            return None
        if self.headers[f"{module}.weight"].dtype not in ("bfloat16", "float16", "float32"):
            return None
        return Unquantized(f"the checkpoint holds a plain {module}.weight")

    def check_against_file(self, layer: str, module: str, resolution: Resolution) -> None:
        """Raise ``ConfigError`` if the configuration contradicts the tensors of the file."""
        found = self.tensors_on_disk(module)
        if found is None or self.headers is None:
            return
        if isinstance(resolution, Unquantized):
            weight = self.headers.get(f"{module}.weight")
            if weight is not None and not weight.dtype.startswith(("bfloat", "float")):
                raise ConfigError(
                    f"{layer}: tensor {module}.weight of {weight.file} is {weight.dtype}, but "
                    f"{module} is unquantized ({resolution.reason}), expected a floating-point "
                    "dtype"
                )
            codes = sorted(found & set(self.marker_tensors))
            if codes:
                tensor = f"{module}.{codes[0]}"
                raise ConfigError(
                    f"{layer}: the configuration leaves {module} unquantized "
                    f"({resolution.reason}), but {self.headers[tensor].file} holds {tensor}"
                )
        elif isinstance(resolution, CheckpointScheme):
            needed = [t.name for t in resolution.tensors if not t.optional]
            missing = [name for name in needed if name not in found]
            if missing:
                file = self.headers[f"{module}.{min(found)}"].file
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

    def may_have(self, module: str) -> bool:
        """Whether the file has a module with this last component, or is not known."""
        last = module.rpartition(".")[2]
        return not self.modules or any(m.rpartition(".")[2] == last for m in self.modules)

    def experts_quantized(self, layer: str) -> bool | None:
        """Whether the file holds codes for an expert of ``layer``; None when it does not say.

        Some models store the experts fused, as siblings of the layer, so only a parent without
        any codes means "no".
        """
        for parent in (layer, layer.rpartition(".")[0]):
            inside = [m for m in self.modules if f"{m}.".startswith(f"{parent}.")]
            quantized = any(self.quantized_on_disk(module) for module in inside)
            if inside and (parent == layer or not quantized):
                return quantized
        return None
