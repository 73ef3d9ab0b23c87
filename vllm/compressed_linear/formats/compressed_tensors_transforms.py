# SPDX-License-Identifier: Apache-2.0
"""Rotations of compressed-tensors' ``transform_config`` that are done while a model runs
(compressed_tensors ``transform``).

Those of weights (``weight_input``, ``weight_output``) are in the files already. Those of queries
and cached keys cancel in attention, and are vLLM's where the cache is quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from vllm.compressed_linear.formats.compressed_tensors_targets import Targets
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
from vllm.compressed_linear.spec.descriptor import TransformSpec
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, dense_scheme

OFFLINE = ("weight_input", "weight_output")
OF_ATTENTION = ("q_attn", "k_cache")


@dataclass(frozen=True)
class Rotation:
    """One entry of ``apply`` of a group: ``kind`` of its matrix, ``block`` of channels (0: all of
    them), and the modules whose ``location`` it rotates. ``where``: the field, for messages."""

    where: str
    kind: str
    block: int
    permuted: bool
    location: str
    targets: Targets
    ignore: Targets

    @classmethod
    def read(cls, config: Fields) -> tuple[Self, ...]:
        """All that are done while a model runs. Raises ``ConfigError`` for other locations."""
        found = []
        for group in config.fields("transform_config").maps("config_groups").values():
            for number, entry in enumerate(group.values.get("apply") or ()):
                fields = Fields.of(entry, f"{group.where}.apply[{number}]")
                location = fields.word("location")
                if location in OFFLINE or location in OF_ATTENTION:
                    continue
                if location not in ("input", "output"):
                    known = ", ".join(("input", "output", *OFFLINE, *OF_ATTENTION))
                    raise ConfigError(
                        f"{fields.where}.location is {location!r}, expected one of {known}"
                    )
                found.append(
                    cls(
                        fields.where,
                        group.word("type"),
                        group.integer("head_dim", "block_size", default=0),
                        bool(group.flag("randomize")),
                        location,
                        Targets.of(f"{fields.where}.targets", fields.names("targets")),
                        Targets.of(f"{fields.where}.ignore", fields.names("ignore")),
                    )
                )
        return tuple(found)

    def renamed(self, rename: Rename) -> Self:
        return replace(
            self, targets=self.targets.renamed(rename), ignore=self.ignore.renamed(rename)
        )

    def selects(self, names: Sequence[str], kind: LayerKind) -> bool:
        """Whether a module's inputs or outputs are rotated."""
        chosen = self.targets.matching(names, kind)
        return bool(chosen) and self.ignore.first(names, kind) is None


def with_rotations(
    found: Resolution,
    rotations: Sequence[Rotation],
    module: str,
    kind: LayerKind,
    file: FileView,
) -> Resolution:
    """What is said of a module, with the rotation of its inputs. Raises ``ConfigError`` for what
    neither this package nor vLLM computes; matrices that are stored are left to vLLM."""
    names = file.names_of(module)
    selected = [rotation for rotation in rotations if rotation.selects(names, kind)]
    if not selected or kind is LayerKind.EMBEDDING:
        return found
    rotation = selected[0]
    says = f"{rotation.where} rotates the {rotation.location}s of {module}"
    if len(selected) > 1:
        raise ConfigError(f"{says}, and so does {selected[1].where}; expected one rotation")
    if rotation.kind != "hadamard":
        return Delegated(f"{says} with a stored matrix ({rotation.kind})")
    if rotation.location == "output" or rotation.permuted:
        what = "randomized" if rotation.permuted else "done after the product"
        raise ConfigError(
            f"{says} by a Hadamard transform that is {what}, which this package does not compute; "
            "apply it to the weights with the library that made the checkpoint"
        )
    scheme = _scheme(found, module, file)
    if scheme is None:
        return Delegated(f"{says}, and no file tells how its weight is stored")
    block = rotation.block or _channels(scheme, module, file)
    if block < 1 or block & (block - 1):
        raise ConfigError(
            f"{says} by a Hadamard transform of {block or 'an unknown number of'} channels; "
            "expected a power of two, or head_dim"
        )
    return replace(scheme, transform=TransformSpec("hadamard", "input", block))


def _scheme(found: Resolution, module: str, file: FileView) -> CheckpointScheme | None:
    """``found``, or how a plain weight is stored."""
    if isinstance(found, CheckpointScheme):
        return found
    weight = file.header(module, "weight")
    if not isinstance(found, Unquantized) or weight is None:
        return None
    return dense_scheme(torch_dtype(weight.dtype)) if weight.dtype in _DENSE else None


_DENSE = tuple(
    str(d).removeprefix("torch.") for d in (torch.bfloat16, torch.float16, torch.float32)
)


def _channels(scheme: CheckpointScheme, module: str, file: FileView) -> int:
    """Input channels of a weight in the files; 0 if they do not tell."""
    for stored in scheme.tensors:
        header = file.header(module, stored.name)
        if stored.role is not Role.CODES or header is None or stored.axes != ("N", "K"):
            continue
        packing = stored.packing
        if packing is None or packing.single:
            return header.shape[1]
        if packing.container_bits % packing.bits == 0:
            return int(header.shape[1] * packing.pack_factor)
    return 0
