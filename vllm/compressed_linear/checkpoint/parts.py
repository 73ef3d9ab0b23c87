# SPDX-License-Identifier: Apache-2.0
"""From the loaded shards of a layer to described parts with their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.compressed_linear.checkpoint.describe import LayerContext, describe
from vllm.compressed_linear.checkpoint.facts import ShardFacts, read_facts
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor


@dataclass(frozen=True)
class Part:
    """A run of shards that one backend computes: output columns [start, start + descriptor.n).
    ``notes``: on its data, for the plan."""

    start: int
    descriptor: CompressedLinearDescriptor
    weights: CompressedWeights
    notes: tuple[str, ...] = ()


def data_notes(facts: Sequence[ShardFacts], sources: Sequence[ShardSource]) -> tuple[str, ...]:
    """Notes of a run of shards, each once; with the names of the shards unless all have it."""
    shards: dict[str, list[str]] = {}
    for fact, source in zip(facts, sources, strict=True):
        if fact.note:
            shards.setdefault(fact.note, []).append(source.name.rpartition(".")[2])
    return tuple(
        note if len(names) == len(facts) else f"{' + '.join(names)}: {note}"
        for note, names in shards.items()
    )


def refine(shards: Sequence[LoadedShard], context: LayerContext) -> list[Part]:
    """Read, validate and describe ``shards``. Raises ``CheckpointError`` on damaged data."""
    read = [read_facts(shard) for shard in shards]
    described = describe([facts for facts, _ in read], [s.source for s in shards], context)
    return [
        Part(
            part.start,
            part.descriptor,
            CompressedWeights(
                shards[part.first : part.stop],
                [numbers for _, numbers in read[part.first : part.stop]],
                zero_points=part.descriptor.weight.zero is not None,
            ),
            data_notes(
                [facts for facts, _ in read[part.first : part.stop]],
                [shard.source for shard in shards[part.first : part.stop]],
            ),
        )
        for part in described
    ]
