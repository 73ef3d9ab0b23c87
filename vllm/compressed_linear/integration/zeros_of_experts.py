# SPDX-License-Identifier: Apache-2.0
"""Zero points of GPTQ experts that are left to vLLM, stored as vLLM's class reads them.

Its class for a CPU adds 1 to every stored zero point, as the first version of GPTQ has it, whatever
version the configuration states: every weight of a file of the second version would be a step off.
Other classes ignore them, since vLLM's experts are symmetric.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from vllm.compressed_linear.checkpoint.completeness import pattern
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.checkpoint.symmetry import read_zeros
from vllm.compressed_linear.formats.base import Format
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.resolution import LayerKind
from vllm.compressed_linear.spec.packing import ZeroBump, pack, unpack
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor

_ZEROS_OF_EXPERT = re.compile(r"(.*\.experts\.\d+\..*)\.qzeros")


class ZerosOfExperts:
    """Zero points of the experts of one checkpoint, whose names in ``file`` are vLLM's."""

    def __init__(self, found: Format, file: FileView) -> None:
        self._format = found
        self._file = file
        self._concerned = found.delegated()[0] == "auto_gptq"
        self._vllms_name = {on_disk: name for name, on_disk in file.disk_names.items()}
        self._schemes: dict[str, CheckpointScheme | None] = {}

    def as_vllm_reads_them(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights`` of the files, with other zero points of experts where vLLM would misread
        them. Raises ``CheckpointError`` for those that contradict a symmetric configuration."""
        for name, tensor in weights:
            found = _ZEROS_OF_EXPERT.fullmatch(name) if self._concerned else None
            if found is None or tensor.is_meta or not tensor.numel():
                yield name, tensor
            else:
                yield name, self._converted(name, found[1], tensor)

    def _converted(self, name: str, module: str, tensor: torch.Tensor) -> torch.Tensor:
        # One of vLLM's layers has one scheme for all of its experts.
        key = pattern(module.rpartition(".experts.")[2]) + module.rpartition(".experts.")[0]
        if key not in self._schemes:
            module = self._vllms_name.get(module, module)
            found = self._format.resolve(module, LayerKind.LINEAR, self._file)
            self._schemes[key] = found if isinstance(found, CheckpointScheme) else None
        scheme = self._schemes[key]
        if scheme is None or not scheme.symmetric:
            return tensor
        stored = next((t for t in scheme.tensors if t.role is Role.ZERO), None)
        return tensor if stored is None else _as_version_1(name, tensor, scheme, stored)


def _as_version_1(
    name: str, tensor: torch.Tensor, scheme: CheckpointScheme, stored: StoredTensor
) -> torch.Tensor:
    assert stored.packing is not None
    bits = scheme.weight.element.bits
    packing = replace(stored.packing, zero_bump=ZeroBump.NONE)
    bump = 0 if stored.packing.zero_bump is ZeroBump.NONE else 1
    dim = stored.axes.index(packing.axis)
    length = int(tensor.shape[dim] * packing.pack_factor)
    codes = unpack(tensor, packing, length, dim)
    counts = {value: n for value, n in enumerate(torch.bincount(codes.flatten()).tolist()) if n}
    reading = read_zeros(scheme.symmetric, bits, bump, counts)
    if reading.error:
        raise CheckpointError(f"{name}: {reading.error}")
    if reading.middle:
        below = (1 << (bits - 1)) - 1
        if [*counts] == [below]:
            return tensor
        return pack(torch.full_like(codes, below), packing, dim)
    return tensor if bump else pack((codes - 1) & ((1 << bits) - 1), packing, dim)
