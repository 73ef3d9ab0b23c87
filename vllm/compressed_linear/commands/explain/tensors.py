# SPDX-License-Identifier: Apache-2.0
"""Find the tensors of a layer in the files, and load only those that are requested.

A fused layer's tensors may be stored shard by shard, fused, or under names that only the model
class's mapper knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.checkpoint.parameter import (
    QKV_SHARDS,
    CheckpointParameter,
    collect_shards,
    create_parameters,
    load_checkpoint_tensor,
)
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard, ShardSource
from vllm.compressed_linear.spec.elements import dtype_name, torch_dtype
from vllm.compressed_linear.spec.scheme import Role, StoredTensor

ReadTensor = Callable[[str], torch.Tensor]
"""A tensor of the checkpoint by vLLM's name for it."""

Stacked = Mapping[str, Sequence[tuple[str, Any]]]
"""Name of a fused tensor → (name of a part, its shard), for models with a mapper for them."""


@dataclass(frozen=True)
class Located:
    """One tensor in the files. ``shard``: as vLLM gives it to the loader, None for all of the
    layer; ``sources`` are what it holds."""

    name: str
    header: TensorHeader
    shard: Any
    sources: tuple[ShardSource, ...]

    @property
    def signature(self) -> Any:
        """Equal for tensors with equal descriptions."""
        return self.shard, self.header.dtype, self.header.shape


LayerTensors = Mapping[str, tuple[Located, ...]]
"""Last component of a tensor's name (``"qweight"``) → its parts in the files."""


def locate(
    layer: str, path: str, sources: Sequence[ShardSource], headers: Headers, stacked: Stacked
) -> LayerTensors:
    """The tensors of ``layer``; empty if the files have none under its names.

    ``path``: the layer's position in the model, by which loaders find it. Some model classes give
    their layers other names, or none.
    """
    found: dict[str, tuple[Located, ...]] = {}
    for name in dict.fromkeys(t.name for source in sources for t in source.scheme.tensors):
        parts = _separate(name, path, sources, headers)
        held = {index for part in parts for index in _indices(part.shard)}
        for fused in dict.fromkeys((f"{layer}.{name}", f"{path}.{name}")):
            if fused in headers and not parts:
                parts = [Located(fused, headers[fused], None, tuple(sources))]
                break
            # One tensor may be the values of several shards (k and v of Gemma 4).
            for part, shard in stacked.get(fused, ()):
                indices = _indices(shard)
                if held.isdisjoint(indices):
                    of = tuple(sources[i] for i in indices)
                    parts.append(Located(part, headers[part], shard, of))
        if parts:
            found[name] = tuple(parts)
    return found


def _separate(
    name: str, path: str, sources: Sequence[ShardSource], headers: Headers
) -> list[Located]:
    """The tensor ``name`` of each source that has one."""
    if len({source.name for source in sources}) != len(sources):
        return []
    parent = path.rpartition(".")[0]
    parts = []
    for shard, source in enumerate(sources):
        if not any(tensor.name == name for tensor in source.scheme.tensors):
            continue
        last = source.name.rpartition(".")[2]
        for module in (source.name, f"{parent}.{last}" if parent else last):
            if f"{module}.{name}" in headers:
                own = f"{module}.{name}"
                parts.append(Located(own, headers[own], shard, (source,)))
                break
    return parts


def _indices(shard: Any) -> tuple[int, ...]:
    if isinstance(shard, tuple):
        return shard
    return (QKV_SHARDS[shard] if isinstance(shard, str) else int(shard),)


def assumed(sources: Sequence[ShardSource]) -> LayerTensors:
    """Tensors as the configuration describes them, every optional one included."""
    found: dict[str, tuple[Located, ...]] = {}
    for shard, source in enumerate(sources):
        for stored in source.scheme.tensors:
            dtype = _described_dtype(source, stored)
            shape = stored.shape(source.extents)
            header = TensorHeader(dtype, shape, prod(shape) * torch_dtype(dtype).itemsize, "")
            part = Located(f"{source.name}.{stored.name}", header, shard, (source,))
            found[stored.name] = (*found.get(stored.name, ()), part)
    return found


def _described_dtype(source: ShardSource, stored: StoredTensor) -> str:
    scale = source.scheme.weight.scale
    name = scale.dtype if stored.role is Role.SCALE and scale is not None else stored.dtype
    return dtype_name(torch_dtype(name))


def load_shards(
    layer: str,
    sources: Sequence[ShardSource],
    tensors: LayerTensors,
    read: ReadTensor | None = None,
    *,
    codes: bool = False,
) -> list[LoadedShard]:
    """The shards as after loading: meta tensors, and real ones that ``read`` returns (everything
    but codes, unless ``codes``).

    Raises ``CheckpointError`` as loading does: a tensor is missing, or has another shape or dtype.
    """
    with torch.device("meta"):
        parameters = create_parameters(sources, layer)
    for name, parameter in parameters.items():
        role = parameter.regions[0].stored.role
        if role is Role.SHAPE or (read is not None and (codes or role is not Role.CODES)):
            parameters[name] = CheckpointParameter(
                data=torch.zeros(parameter.shape, dtype=parameter.dtype),
                regions=parameter.regions,
                layer_name=layer,
                tensor_name=name,
            )
        for part in tensors.get(name, ()):
            real = not parameters[name].is_meta
            tensor = read(part.name) if real and read is not None else _placeholder(part, role)
            load_checkpoint_tensor(parameters[name], tensor, part.shard)
    return collect_shards(parameters, sources)


def _placeholder(part: Located, role: Role) -> torch.Tensor:
    """Meta tensor of the header; for a tensor of role SHAPE, the expected values."""
    if role is Role.SHAPE:
        return torch.tensor([sum(s.full_n for s in part.sources), part.sources[0].full_k])
    dtype = getattr(torch, part.header.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{part.name} has an unknown dtype {part.header.dtype!r}")
    return torch.empty(part.header.shape, dtype=dtype, device="meta")
