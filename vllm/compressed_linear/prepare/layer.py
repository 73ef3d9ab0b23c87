# SPDX-License-Identifier: Apache-2.0
"""From loaded shards to executors: describe, select, prepare, check, and the composite.

Imports nothing of vLLM. ``integration/linear.py`` attaches the result to vLLM's layers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from vllm.compressed_linear.backends import measurements as tune_file
from vllm.compressed_linear.backends.base import QuantLinearMethod
from vllm.compressed_linear.backends.registry import Selection, select
from vllm.compressed_linear.backends.shared.outputs import (
    output_tensors,
    output_text,
    with_output,
)
from vllm.compressed_linear.backends.shared.rotation import rotated
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import Part, refine
from vllm.compressed_linear.checkpoint.shard import CheckpointError, LoadedShard
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.cache.store import PreparedCache, cache_key
from vllm.compressed_linear.prepare.malloc import large_blocks_apart
from vllm.compressed_linear.prepare.plan import (
    CACHE_HIT,
    CACHE_MISS,
    CACHE_UNUSED,
    Plan,
    PlanEntry,
    rejections,
)
from vllm.compressed_linear.prepare.self_check import SelfCheckError, self_check
from vllm.compressed_linear.settings import Settings
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor


class OtherPlanError(ValueError):
    """Reloaded weights are described otherwise than those that a running layer was prepared for."""


def product_of(
    descriptor: CompressedLinearDescriptor, platform: Platform
) -> CompressedLinearDescriptor:
    """What a backend is asked for: ``descriptor.product``, and on CPUs, whose kernels have no
    rotations, without the one of x, which is done before, in fp32."""
    product = descriptor.product
    if product.transform is None or platform.device != "cpu":
        return product
    return replace(product, transform=None, input_dtype="float32")


@dataclass(frozen=True)
class Executor:
    """One part of a layer: a backend instance and its output columns [start, stop).

    ``descriptor``: of the part, whose product the backend computes (``product_of``)."""

    method: QuantLinearMethod
    selection: Selection
    start: int
    stop: int
    descriptor: CompressedLinearDescriptor
    rotation: int = field(init=False)
    limit: float = field(init=False)
    output: str = field(init=False)

    def __post_init__(self) -> None:
        # Made here, since compilers cannot trace it.
        ours = self.descriptor.transform if self.method.descriptor.transform is None else None
        object.__setattr__(self, "rotation", 0 if ours is None else ours.block)
        activation = self.descriptor.activation
        object.__setattr__(self, "limit", 0.0 if activation is None else activation.limit)
        object.__setattr__(self, "output", output_text(self.descriptor.output_activation))

    def apply(
        self, tensors: Mapping[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., K] → its columns [..., stop − start]."""
        taken = rotated(x, self.rotation)
        if self.limit:
            taken = taken.clamp(-self.limit, self.limit)
        return with_output(self.method.apply(tensors, taken, bias), self.output, tensors)


def prepare(
    name: str,
    kind: str,
    shards: Sequence[LoadedShard],
    context: LayerContext,
    platform: Platform,
    settings: Settings,
    plan: Plan,
    pinned: Sequence[Executor] = (),
    cache: PreparedCache | None = None,
    note: str = "",
) -> list[tuple[Executor, dict[str, torch.Tensor]]]:
    """Prepare a layer's shards: executors, each with its prepared tensors by name. The choice is
    recorded in ``plan``. ``pinned``: executors of an earlier load, whose choice stays.
    ``cache``: of prepared tensors; not used for reloads. ``note`` is for the plan.

    Raises ``CheckpointError`` on damaged data, ``NoBackendError`` if no backend can or may run a
    part, ``SelfCheckError`` if a backend computes wrong numbers, and ``ValueError`` if reloaded
    weights need another plan than the pinned one.
    """
    try:
        parts = refine(shards, context)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: tensor {error}") from None
    if pinned:
        _check_pinned(name, parts, pinned)
    prepared = []
    for index, part in enumerate(parts):
        product, output = product_of(part.descriptor, platform), part.descriptor.output_activation
        selection = pinned[index].selection if pinned else choose(name, product, platform, settings)
        method = selection.chosen(product)
        obtained = _obtain(
            name, method, replace(part, descriptor=product), platform, None if pinned else cache
        )
        tensors = obtained.tensors
        if output is not None:
            tensors = {**tensors, **output_tensors(output, part.weights)}
        stop = part.start + product.n
        executor = Executor(method, selection, part.start, stop, part.descriptor)
        prepared.append((executor, tensors))
        plan.add(
            PlanEntry(
                name=name,
                kind=kind,
                backend=method.name,
                variant=selection.variant,
                descriptor=str(part.descriptor),
                bytes_checkpoint=checkpoint_bytes(part.weights.shards),
                bytes_prepared=sum(t.nbytes for t in tensors.values()),
                prepare_seconds=obtained.seconds,
                prepared_variant=method.prepared_variant(product, platform),
                batch_invariant=method.rows_are_independent(product, platform),
                chosen_by=selection.chosen_by,
                note="; ".join(
                    filter(
                        None,
                        (
                            note,
                            _composite_note(parts, part),
                            *part.notes,
                            contract_note(method),
                            "x is rotated before the product" if executor.rotation else "",
                            "" if output is None else "y is quantized after the product",
                        ),
                    )
                ),
                cache=obtained.cache,
                rejected=rejections(selection),
            ),
            index,
        )
    return prepared


@dataclass(frozen=True)
class _Obtained:
    """Checked tensors, seconds of preparation, and action of the cache (``PlanEntry.cache``)."""

    tensors: dict[str, torch.Tensor]
    seconds: float
    cache: str


def _obtain(
    name: str,
    method: QuantLinearMethod,
    part: Part,
    platform: Platform,
    cache: PreparedCache | None,
) -> _Obtained:
    """Load from the cache, or prepare and cache. Unchecked tensors are neither used nor cached."""
    begin = time.perf_counter()
    key = None if cache is None else cache_key(method, part, platform)
    if cache is not None and key is not None and (found := cache.load(key)) is not None:
        seconds = time.perf_counter() - begin
        try:
            self_check(name, method, found, part.weights)
            return _Obtained(found, seconds, CACHE_HIT)
        except SelfCheckError as error:
            cache.refuse(key, f"fails the self-check ({error})")
    with large_blocks_apart():
        tensors = method.prep_weights_for_execution(part.weights)
    seconds = time.perf_counter() - begin
    self_check(name, method, tensors, part.weights)
    if cache is None:
        return _Obtained(tensors, seconds, "")
    if key is None:
        return _Obtained(tensors, seconds, CACHE_UNUSED)
    cache.store(key, name, str(part.descriptor), tensors)
    return _Obtained(tensors, seconds, CACHE_MISS)


def choose(
    name: str, descriptor: CompressedLinearDescriptor, platform: Platform, settings: Settings
) -> Selection:
    """The backend for the product of (a part of) layer ``name`` under the user's settings and the
    tune file. Raises ``NoBackendError`` with every reason if there is none."""
    quantized = descriptor.weight.element.kind != "dense"
    return select(
        product_of(descriptor, platform),
        platform,
        override=settings.backend.backend_for(name, quantized=quantized),
        strict=settings.strict and quantized,
        layer=name,
        measurements=tune_file.load(settings.tune_file, platform).measurements,
    )


def settle_lookup(
    name: str,
    shards: Sequence[LoadedShard],
    context: LayerContext,
    platform: Platform,
    settings: Settings,
) -> LayerContext:
    """``context`` without ``lookup`` if the best backend for products does not support lookups: an
    unquantized table keeps its natural weight for them, so the best backend is used."""
    if not context.lookup:
        return context
    plain = replace(context, lookup=False)
    for part in refine(shards, plain):
        chosen = choose(name, part.descriptor, platform, settings).chosen
        if not chosen.can_implement(replace(part.descriptor, lookup=True), platform):
            return plain
    return context


def _composite_note(parts: Sequence[Part], part: Part) -> str:
    if len(parts) == 1:
        return ""
    names = [s.source.name.rpartition(".")[2] for s in part.weights.shards]
    return f"{' + '.join(dict.fromkeys(names))} of a fused layer whose shards differ"


def contract_note(method: QuantLinearMethod) -> str:
    """Note for the plan if a backend quantizes x and the checkpoint does not; usually empty."""
    own = method.contract(method.descriptor).activation
    if own is None:
        return ""
    return (
        f"x rounded to {own}, which the checkpoint does not ask for: error of each output up to "
        f"Σ max|x| / {2 * own.maximum:g} · Σ|w| over the groups"
    )


def checkpoint_bytes(shards: Sequence[LoadedShard]) -> int:
    """Bytes of the checkpoint's tensors, this rank's part."""
    return sum(t.nbytes for shard in shards for t in shard.tensors.values())


def _check_pinned(name: str, parts: Sequence[Part], pinned: Sequence[Executor]) -> None:
    now = [str(part.descriptor) for part in parts]
    then = [str(executor.descriptor) for executor in pinned]
    if [p.descriptor for p in parts] != [e.descriptor for e in pinned]:
        raise OtherPlanError(
            f"{name}: reloaded weights need {now}, but the running model was prepared for {then}; "
            "restart to load them"
        )


def run(
    executors: Sequence[Executor],
    tensors: Sequence[dict[str, torch.Tensor]],
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Compute a layer: one backend, or one for each run of equal shards, and a concatenation."""
    if len(executors) == 1:
        return executors[0].apply(tensors[0], x, bias)
    outputs = [
        executor.apply(own, x, None if bias is None else bias[executor.start : executor.stop])
        for executor, own in zip(executors, tensors, strict=True)
    ]
    return torch.cat(outputs, dim=-1)
