# SPDX-License-Identifier: Apache-2.0
"""Layers that are prepared through a prepared-weights cache, for its tests.

``python -m tests.support.cached_layers DIRECTORY OUT SEED...`` says ``ready``, waits for a line on
stdin, prepares the layers of these seeds and writes their tensors, what the cache did, and its
warnings to OUT.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.synthetic import Quant, random_weight
from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.cache.store import PreparedCache
from vllm.compressed_linear.prepare.layer import Executor, prepare
from vllm.compressed_linear.prepare.plan import Plan
from vllm.compressed_linear.settings import Settings

QUANT = Quant("gptq", symmetric=False, act_order=True)
N, K = 80, 128


def shard(seed: int = 0, quant: Quant = QUANT, n: int = N, k: int = K) -> LoadedShard:
    """A random weight, as loaded."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(k, generator=generator) if quant.act_order else None
    tensors, _ = random_weight(quant, n, k, generator, order)
    return LoadedShard(ShardSource(f"layer{seed}", quant.scheme(), n, k, 0, n, 0, k), tensors)


PLAN = Plan()
"""Of the layers that these tests prepare."""


@dataclass(frozen=True)
class PreparedPart:
    """What runs a part of a layer, and with which tensors."""

    executor: Executor
    tensors: dict[str, torch.Tensor]

    @property
    def method(self) -> QuantLinearMethod:
        return self.executor.method


def prepared(
    cache: PreparedCache | None,
    *shards: LoadedShard,
    name: str = "model.layers.0.layer",
    context: LayerContext | None = None,
    settings: Settings | None = None,
    pinned: list[Executor] | None = None,
) -> PreparedPart:
    """The one part of a layer, through ``cache``."""
    ((executor, tensors),) = prepare(
        name,
        "linear",
        shards or [shard()],
        context or LayerContext("float32", "float32"),
        Platform.detect(),
        settings or Settings(),
        PLAN,
        pinned or (),
        cache,
    )
    return PreparedPart(executor, tensors)


def what_the_cache_did(name: str = "model.layers.0.layer") -> str:
    """``PlanEntry.cache`` of the layer that was prepared last under this name."""
    return PLAN.entries[(name, 0)].cache


def main(directory: Path, out: Path, seeds: list[int]) -> None:
    torch.set_num_threads(1)
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm.compressed_linear.prepare.cache.store").addHandler(handler)
    shards = [shard(seed) for seed in seeds]
    print("ready", flush=True)
    sys.stdin.readline()
    cache = PreparedCache(directory)
    found = []
    for loaded in shards:
        executor = prepared(cache, loaded)
        found.append((what_the_cache_did(), executor.tensors))
    torch.save({"layers": found, "warnings": warnings}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(seed) for seed in sys.argv[3:]])
