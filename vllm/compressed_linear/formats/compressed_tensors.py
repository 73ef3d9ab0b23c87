# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: groups of modules with equal quantization, chosen by targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from vllm.compressed_linear.formats.base import Format, Hints, register_format
from vllm.compressed_linear.formats.compressed_tensors_groups import Group, read_groups
from vllm.compressed_linear.formats.compressed_tensors_schemes import form_on_disk
from vllm.compressed_linear.formats.compressed_tensors_targets import Targets
from vllm.compressed_linear.formats.compressed_tensors_transforms import (
    Rotation,
    with_rotations,
)
from vllm.compressed_linear.formats.entries import Rename
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.scheme import CheckpointScheme


@register_format("compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors(Format):
    """``config_groups`` with targets and an ignore list
    (compressed_tensors ``utils/match.py``, ``quantization/lifecycle/apply.py``).

    ``groups``: target → groups that have it, the last one first, as it decides in the library. Of
    several groups for a module the one decides whose tensors the file has.
    """

    aliases = ("compressed-tensors",)
    vllm_name = "compressed-tensors"
    marker_tensors = ("weight_packed",)

    ignore: Targets
    targets: Targets
    groups: dict[str, tuple[Group, ...]]
    rotations: tuple[Rotation, ...] = ()

    @classmethod
    def parse(cls, config: dict[str, Any]) -> Self:
        fields = Fields(config)
        found = read_groups(fields)
        if not found:
            raise ConfigError("compressed-tensors: config_groups is missing or empty")
        by_target: dict[str, tuple[Group, ...]] = {}
        for group, targets in found:
            for target in targets:
                by_target[target] = (group, *by_target.get(target, ()))
        return cls(
            config,
            ignore=Targets.of("ignore", fields.names("ignore")),
            targets=Targets.of("targets", by_target),
            groups=by_target,
            rotations=Rotation.read(fields),
        )

    @classmethod
    def unsupported(cls, config: dict[str, Any]) -> str | None:
        found = [group for group, _ in read_groups(Fields(config))]
        if any(group.refusal or group.sparsity or not group.reason for group in found):
            return None
        reasons = [group.reason for group in found if group.weighted]
        return "; ".join(reasons) or "compressed-tensors without config_groups"

    def has_attention_scales(self, file: FileView) -> bool:
        return bool(self.config.get("kv_cache_scheme"))

    def kv_cache_scheme(self) -> dict[str, Any] | None:
        scheme: dict[str, Any] | None = self.config.get("kv_cache_scheme")
        return scheme or None

    def hints(self) -> Hints:
        # Here a group index means activation order; GPTQ files always have one.
        return Hints(reordered=True)

    def renamed(self, rename: Rename) -> Self:
        rotations = tuple(rotation.renamed(rename) for rotation in self.rotations)
        return replace(super().renamed(rename), rotations=rotations)

    def resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        found = self._resolve(module, kind, file)
        return with_rotations(found, self.rotations, module, kind, file)

    def _resolve(self, module: str, kind: LayerKind, file: FileView) -> Resolution:
        names = file.names_of(module)
        if (entry := self.ignore.first(names, kind)) is not None:
            return Unquantized(f"ignore: {entry}")
        targets = self.targets.matching(names, kind)
        if not targets and file.quantized_on_disk(module):
            # Which subclass of a layer was quantized is not known here.
            targets = self.targets.classes()
        groups = [group for target in targets for group in self.groups[target]]
        if not groups:
            return Unquantized("no config group targets it")
        chosen = _settled(groups, module, kind, file)
        found = chosen.resolve(module, kind, file)
        quantized = not isinstance(found, Unquantized)
        if quantized and (plain := file.unquantized_on_disk(module)) is not None:
            return plain
        sparse = form_on_disk(partial(file.header, module)) is None and chosen.sparsity
        if refusal := chosen.refusal or sparse:
            raise ConfigError(f"{module}: {refusal}")
        return found


def _settled(groups: Sequence[Group], module: str, kind: LayerKind, file: FileView) -> Group:
    """The first of ``groups`` that the module's tensors fit; the first one if none does."""
    if all(group == groups[0] for group in groups) or file.headers is None:
        return groups[0]
    found = [(group, group.resolve(module, kind, file)) for group in groups]
    fitting = [
        (group, resolution)
        for group, resolution in found
        if not isinstance(resolution, CheckpointScheme) or file.fits(module, resolution)
    ]
    # A symmetric weight may have zero points too, but an asymmetric one must; and what is left to
    # vLLM fits everything.
    exact = [
        g
        for g, r in fitting
        if not (isinstance(r, CheckpointScheme) and r.symmetric) and not isinstance(r, Delegated)
    ]
    return (exact or [group for group, _ in fitting] or list(groups))[0]
