# SPDX-License-Identifier: Apache-2.0
"""Split of vLLM's linear layers among ranks, read from the layer objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.compressed_linear.checkpoint.shard import ShardSource
from vllm.compressed_linear.formats.resolution import ConfigError, Unquantized
from vllm.compressed_linear.spec.scheme import CheckpointScheme


@dataclass(frozen=True)
class Member:
    """A logical weight that a layer fuses: its name in the checkpoint, its resolution, its number
    of rows there (None if no file tells), and the dtypes of its tensors there (those that a file
    tells)."""

    name: str
    resolution: CheckpointScheme | Unquantized
    rows: int | None = None
    dtypes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardGeometry:
    """One logical weight of a layer: its shape on disk and this rank's part of it."""

    full_n: int
    full_k: int
    n_start: int
    n: int
    k_start: int
    k: int
    padding: int = 0

    def source(self, name: str, scheme: CheckpointScheme) -> ShardSource:
        """The source of the shard, with its name in the checkpoint and the format's scheme."""
        return ShardSource(
            name,
            scheme,
            self.full_n,
            self.full_k,
            self.n_start,
            self.n,
            self.k_start,
            self.k,
            self.padding,
        )


def shard_geometry(
    layer: Any,
    input_size_per_partition: int,
    output_partition_sizes: Sequence[int],
    input_size: int,
) -> list[ShardGeometry]:
    """Geometry of every partition of ``layer``, from the arguments of ``create_weights``."""
    from vllm.model_executor.layers.linear import QKVParallelLinear, ReplicatedLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    rank, size = int(layer.tp_rank), int(layer.tp_size)
    k_start = rank * input_size_per_partition if input_size_per_partition != input_size else 0
    k = (input_size, k_start, input_size_per_partition)

    if isinstance(layer, VocabParallelEmbedding):
        indices = layer.shard_indices
        n = indices.num_org_elements
        padding = output_partition_sizes[0] - n
        return [_geometry(layer.org_vocab_size, indices.org_vocab_start_index, n, k, padding)]
    if isinstance(layer, QKVParallelLinear):
        kv_rank = rank // layer.num_kv_head_replicas
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
        widths = (layer.head_size, layer.head_size, layer.v_head_size)
        return [
            _geometry(count * width, (kv_rank if i else rank) * n, n, k)
            for i, (count, width, n) in enumerate(
                zip(heads, widths, output_partition_sizes, strict=True)
            )
        ]
    split = not isinstance(layer, ReplicatedLinear) and input_size_per_partition == input_size
    if split and size > 1 and layer.output_size == sum(output_partition_sizes):
        split = False  # a row-parallel layer whose input is not split
    if not split:
        return [_geometry(n, 0, n, k) for n in output_partition_sizes]
    return [_geometry(n * size, rank * n, n, k) for n in output_partition_sizes]


def check_repeated_rows(
    layer: str, members: Sequence[Member], geometry: Sequence[ShardGeometry], ranks: int
) -> None:
    """Raise ``ConfigError`` for a layer that has more rows on several ``ranks`` than in the files:
    vLLM's Mamba-2 mixer gives each rank a copy of a state space's only group, by a loader for plain
    weights."""
    if ranks == 1 or len(members) != 1 or len(geometry) != 1:
        return
    rows, full = members[0].rows, geometry[0].full_n
    if rows is not None and rows < full and isinstance(members[0].resolution, CheckpointScheme):
        raise ConfigError(
            f"{layer}: vLLM's model has {full} rows in it on {ranks} ranks, but the file has "
            f"{rows}: rows that every rank needs are repeated, which vLLM does for unquantized "
            "weights only; serve it with --tensor-parallel-size 1, or with this layer unquantized"
        )


def assign(
    layer: str, members: Sequence[Member], geometry: Sequence[ShardGeometry]
) -> list[Member]:
    """The member of each partition of ``layer``.

    A member may span several partitions, as q, k and v of a linear attention that are one tensor in
    the file. If the members differ, their rows tell which. Raises ``ConfigError`` if they do not.
    """
    if len(members) == len(geometry):
        return list(members)
    if len({member.resolution for member in members}) == 1:
        return [replace(members[0], name=layer)] * len(geometry)
    out: list[Member] = []
    rest = list(geometry)
    for member in members:
        rows = 0
        while member.rows is not None and rows < member.rows and rest:
            rows += rest.pop(0).full_n
            out.append(member)
        if rows != member.rows:
            break
    if len(out) == len(geometry) and out[-1] is members[-1]:
        return out
    found = ", ".join(
        f"{member.name} ({'unknown' if member.rows is None else member.rows} rows, "
        f"{member.resolution})"
        for member in members
    )
    raise ConfigError(
        f"{layer}: the model has {len(geometry)} partitions of "
        f"{', '.join(str(part.full_n) for part in geometry)} rows and fuses {found}, whose "
        "quantization differs; expected members that end at the border of a partition, so it is "
        "not known which scheme each partition has"
    )


def _geometry(
    full_n: int, n_start: int, n: int, k: tuple[int, int, int], padding: int = 0
) -> ShardGeometry:
    full_k, k_start, k_size = k
    return ShardGeometry(full_n, full_k, n_start, n, k_start, k_size, padding)
