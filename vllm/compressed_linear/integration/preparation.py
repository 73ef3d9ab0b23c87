# SPDX-License-Identifier: Apache-2.0
"""Shared state of the layers of one model during preparation: settings, plan, cache.

The method of each layer gets the ``ModelPreparation``; ``Prepared`` remains on the layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize, ref

import torch
from torch.nn import Parameter

from vllm.compressed_linear.backends import measurements
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.shard import LoadedShard
from vllm.compressed_linear.formats.resolution import LayerKind
from vllm.compressed_linear.integration import compat, compat_loading
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.cache.store import PreparedCache
from vllm.compressed_linear.prepare.layer import Executor, prepare, run, settle_lookup
from vllm.compressed_linear.prepare.plan import Plan, disagreements, rounding_note
from vllm.compressed_linear.settings import Settings

logger = compat.logger(__name__)

PROCESS_PLAN = Plan()
"""Plan of all models that vLLM loads in this process, such as a target and its drafter. The key of
vLLM's compile caches has its fingerprint. Only ``CompressedLinearConfig`` uses this global; all
other code is given a plan."""

_PLATFORM: list[Platform] = []


def detect_platform() -> Platform:
    """This process's platform, probed once."""
    if not _PLATFORM:
        _PLATFORM.append(Platform.detect(compat.current_device()))
    return _PLATFORM[0]


@cache
def _opened_cache(directory: str, model: str) -> PreparedCache:
    """The cache of a directory; shared by all layers of a model, so that warnings appear once."""
    return PreparedCache(Path(os.path.expanduser(directory)), model)


class Prepared:
    """Executors of one layer and the names of their tensors on it. ``looks_up``: whether they also
    look up rows."""

    def __init__(
        self, layer: Any, parts: Sequence[tuple[Executor, Mapping[str, torch.Tensor]]]
    ) -> None:
        """Register the tensors of ``parts`` on ``layer``, replacing those of an earlier load."""
        self.executors = [executor for executor, _ in parts]
        self.names = [list(tensors) for _, tensors in parts]
        self.looks_up = all(executor.descriptor.lookup for executor in self.executors)
        for index, (_, tensors) in enumerate(parts):
            for name, tensor in tensors.items():
                attribute = self.attribute(index, name)
                if hasattr(layer, attribute):
                    delattr(layer, attribute)
                layer.register_parameter(attribute, Parameter(tensor, requires_grad=False))

    @staticmethod
    def attribute(index: int, name: str) -> str:
        return f"prepared{index}_{name}"

    def tensors(self, layer: Any) -> list[dict[str, torch.Tensor]]:
        """The prepared tensors of each executor, under the names that its backend gave them."""
        return [
            {name: getattr(layer, self.attribute(index, name)) for name in names}
            for index, names in enumerate(self.names)
        ]

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return run(self.executors, self.tensors(layer), x, bias)

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] → rows [..., K]; of a layer whose descriptor says ``lookup``."""
        (executor,), (tensors,) = self.executors, self.tensors(layer)
        return executor.method.embedding(tensors, ids)


@dataclass(frozen=True)
class HeldWeight:
    """The weight, and the bias, that ``layer`` holds prepared, to be compared with another's."""

    prepared: Prepared
    layer: ref[torch.nn.Module]

    def same_as(self, other: HeldWeight) -> bool:
        """Whether both give the same results: same backends, descriptors, tensors and biases."""
        mine, theirs = self.layer(), other.layer()
        if mine is None or theirs is None:
            return False
        if self._kinds(mine) != other._kinds(theirs):
            return False
        pairs = zip(self._tensors(mine), other._tensors(theirs), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def _kinds(self, layer: torch.nn.Module) -> list[Any]:
        executors = zip(self.prepared.executors, self.prepared.names, strict=True)
        kinds = [(e.method.name, e.descriptor, e.start, e.stop, n) for e, n in executors]
        return [*kinds, getattr(layer, "bias", None) is None]

    def _tensors(self, layer: torch.nn.Module) -> list[torch.Tensor]:
        bias = getattr(layer, "bias", None)
        prepared = [t for part in self.prepared.tensors(layer) for t in part.values()]
        return prepared if bias is None else [*prepared, bias]


@dataclass(frozen=True)
class ModelPreparation:
    """Settings of the user, and the plan in which choices are recorded."""

    settings: Settings
    plan: Plan = field(hash=False, compare=False)

    def prepare(
        self,
        layer: Any,
        name: str,
        kind: LayerKind,
        shards: Sequence[LoadedShard],
        context: LayerContext,
        earlier: Prepared | None,
        *,
        dummy: bool,
        note: str = "",
    ) -> Prepared:
        """Prepare ``shards`` and attach the result to ``layer``.

        ``name``, ``kind`` and ``note`` are for the plan; ``earlier``: the result before a reload.
        Results for ``dummy`` weights are not cached.
        """
        settings, kept = self.settings, None
        if not dummy and settings.cache:
            kept = _opened_cache(settings.cache, compat.model_name())
        pinned = () if earlier is None else earlier.executors
        self.plan.platform = platform = detect_platform()
        parts = prepare(
            name, kind, shards, context, platform, settings, self.plan, pinned, kept, note
        )
        prepared = Prepared(layer, parts)
        if earlier is None:
            self.plan.layer_finished()
            loading = compat_loading.being_loaded()
            if loading is not None and loading.model is not None and self.plan.target is not None:
                self.plan.owner = ref(loading.model)
                finalize(layer, self.plan.remove, name).atexit = False
        return prepared

    def settle_lookup(
        self, name: str, shards: Sequence[LoadedShard], context: LayerContext
    ) -> LayerContext:
        """``context`` without ``lookup`` if the best backend does not support it."""
        return settle_lookup(name, shards, context, detect_platform(), self.settings)


def report(plan: Plan, tune_file: str) -> None:
    """Log the choices of the models that this process has loaded so far, and write the plan."""
    plan.rank, size = compat.model_rank()
    where = f"rank {plan.rank}: " if size > 1 else ""
    logger.info("compressed_linear: %s%s", where, plan.summary())
    if note := measurements.load(tune_file, detect_platform()).note:
        logger.warning("%s%s", where, note)
    if compat.tensor_parallel_rank()[1] > 1:
        for line in disagreements(compat.gather_from_ranks(plan.choices())):
            logger.warning("Ranks run a layer on different backends: %s", line)
    choices = [(entry.backend, entry.rejected) for entry in plan.entries.values()]
    if note := rounding_note(choices):
        logger.info("compressed_linear: %s%s", where, note)
    if slow := plan.slow_layers():
        logger.warning(
            "%d of them run on the reference backend, which dequantizes the whole weight to "
            "fp32 for every call and is slow, because no other backend can: %s: %s. "
            "VLLM_COMPRESSED_LINEAR_STRICT=1 refuses to start like this.",
            len(slow),
            slow[0].name,
            "; ".join(f"{r.backend}: {', '.join(r.reasons)}" for r in slow[0].rejected),
        )
    try:
        plan.write()
    except OSError as error:
        logger.warning("The plan was not written to %s: %s", plan.plan_file, error)
