# SPDX-License-Identifier: Apache-2.0
"""From the loaded shards of a layer to described parts with their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.compressed_linear.checkpoint.describe import LayerContext, describe
from vllm.compressed_linear.checkpoint.facts import read_facts
from vllm.compressed_linear.checkpoint.shard import LoadedShard
from vllm.compressed_linear.checkpoint.weights import CompressedWeights
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor


@dataclass(frozen=True)
class Part:
    """A run of shards that one backend computes: output columns [start, start + descriptor.n)."""

    start: int
    descriptor: CompressedLinearDescriptor
    weights: CompressedWeights


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
        )
        for part in described
    ]
