# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a model as vLLM builds them, without its weights.

The model class is constructed on the meta device, so names, fused shards and the split among ranks
equal those of a real load for every architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.compressed_linear.checkpoint.completeness import Finding
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.headers import Headers, shard_names
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource, dense_shard
from vllm.compressed_linear.commands.explain import meta_model
from vllm.compressed_linear.commands.explain.left import (
    NOT_LINEAR,
    BytesInFiles,
    LeftToVllm,
    bytes_of_parameters,
    why_left,
)
from vllm.compressed_linear.commands.explain.refusals import AskedLayers, Refusal, short
from vllm.compressed_linear.commands.explain.tensors import Stacked
from vllm.compressed_linear.formats.resolution import ConfigError, LayerKind, Unquantized
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.integration.completeness_from_headers import findings_from_headers
from vllm.compressed_linear.integration.config import NAME, CompressedLinearConfig
from vllm.compressed_linear.integration.registration import register_with_vllm
from vllm.compressed_linear.integration.unasked import ask_for_all
from vllm.compressed_linear.prepare.plan import DELEGATED, Plan, PlanEntry


class ModelUnavailableError(RuntimeError):
    """vLLM's model class cannot be built here; the message says why. ``certain``: a load fails in
    the same way; else perhaps only a model without weights does."""

    def __init__(self, message: str, *, certain: bool = True) -> None:
        super().__init__(message)
        self.certain = certain


class TensorParallelError(ValueError):
    """The model cannot be split among that many ranks."""


@dataclass(frozen=True)
class ModelLayer:
    """One layer that this package will run.

    ``name``: in the model class, and in the plan. ``path``: position in the model. ``sources``: the
    shards of a layer of which at least one is quantized. ``dense``: this rank's weight (a meta
    tensor) of an unquantized layer. ``reasons``: which rule left which shard unquantized.
    ``notes``: of the plan, without and with lookups in the prepared copy.
    """

    name: str
    path: str
    kind: LayerKind
    context: LayerContext
    sources: tuple[ShardSource, ...] = ()
    dense: LoadedShard | None = None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, str] = ("", "")


@dataclass
class ModelLayers:
    """All linear layers of one rank, in the model's order. ``others``: modules with weights that
    are not linear. ``refused``: layers whose load fails on every machine. ``findings``: of rank 0,
    about what the files and the model have left over. ``headers`` have vLLM's names; ``stacked``:
    parts of fused tensors that only the model class's mapper knows."""

    layers: list[ModelLayer] = field(default_factory=list)
    left: list[LeftToVllm] = field(default_factory=list)
    others: list[LeftToVllm] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    headers: Headers = field(default_factory=lambda: Headers({}))
    stacked: Stacked = field(default_factory=dict)
    dtype: str = ""
    model_class: str = ""


def model_layers(
    path: Path,
    architectures: Sequence[str],
    *,
    tp_size: int,
    dtype: str,
    headers: Headers,
    vllms_reason: str = "",
) -> list[ModelLayers]:
    """The layers of each rank of the checkpoint whose tensors are ``headers``. ``vllms_reason``:
    why every layer is left to vLLM's own code; empty if this package reads it.

    Raises ``ModelUnavailableError`` if the class cannot be built, ``TensorParallelError`` if the
    model cannot be split so, and ``ConfigError`` for an invalid configuration.
    """
    register_with_vllm()
    try:
        meta_model.inspect_models_here(list(architectures))
        config = meta_model.engine_config(
            str(path), dtype=dtype, tp_size=tp_size, quantization=None if vllms_reason else NAME
        )
    except Exception as error:
        raise _unavailable(error) from error
    try:
        meta_model.check_tensor_parallel(config)
    except ValueError as error:
        raise TensorParallelError(str(error)) from error
    return [_layers_of_rank(config, rank, vllms_reason, headers) for rank in range(tp_size)]


def _unavailable(error: Exception) -> Exception:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return cause
        cause = cause.__cause__ or cause.__context__
    text = short(error)
    certain = not meta_model.only_without_weights(text)
    kind = type(error).__name__
    kind = "" if kind == "ValidationError" else f"{kind}: "
    return ModelUnavailableError(kind + text, certain=certain)


def _layers_of_rank(config: Any, rank: int, vllms_reason: str, headers: Headers) -> ModelLayers:
    plan = Plan()
    asked = AskedLayers()

    def change(copied: Any) -> None:
        if isinstance(copied, CompressedLinearConfig):
            copied.plan = plan
        asked.watch(copied)

    try:
        with meta_model.built_on_meta(config, rank, change) as (model, quant_config):
            found = ModelLayers(
                headers=headers,
                dtype=str(config.model_config.dtype).removeprefix("torch."),
                model_class=type(model).__name__,
            )
            if isinstance(quant_config, CompressedLinearConfig):
                ask_for_all(model, quant_config)
                found.headers = quant_config.file.headers or headers
                found.stacked = meta_model.stacked_names(model, headers, found.headers)
            delegated = {e.name: e for e in plan.entries.values() if e.backend == DELEGATED}
            # What is left to vLLM is shown of rank 0 only.
            sizes = BytesInFiles(Headers({}) if rank else found.headers)
            _Walk(found, quant_config, asked, delegated, vllms_reason, sizes).over(model)
            if isinstance(quant_config, CompressedLinearConfig) and not (rank or asked.refused):
                found.findings = findings_from_headers(model, config, quant_config, headers)
            return found
    except Exception as error:
        if asked.refused:  # more likely the cause than what followed from it
            refusal = next(iter(asked.refused.values()))
            raise ModelUnavailableError(f"{refusal.name}: {refusal.message}") from error
        raise _unavailable(error) from error


class _Walk:
    """Sorts the modules of a model into ``found``."""

    def __init__(
        self,
        found: ModelLayers,
        quant_config: Any,
        asked: AskedLayers,
        delegated: dict[str, PlanEntry],
        vllms_reason: str,
        sizes: BytesInFiles,
    ) -> None:
        self.found = found
        self.quant_config = quant_config
        self.asked = asked
        self.delegated = delegated
        self.vllms_reason = vllms_reason
        self.sizes = sizes
        self.packed = getattr(quant_config, "packed_modules_mapping", None) or {}

    def over(self, model: Any) -> None:
        """Sort every module of ``model``; refused ones that the model threw away come last."""
        refused = dict(self.asked.refused)
        for name, module in model.named_modules():
            refusal = refused.pop(id(module), None)
            if refusal is not None:
                self._refused(refusal, module)
            elif not self._ours(name, module):
                self._left(name, module)
        for refusal in refused.values():
            self._refused(refusal, None)

    def _refused(self, refusal: Refusal, module: Any) -> None:
        if refusal.ours:
            self.found.refused.append(refusal)
            return
        reason = refusal.reason or self.vllms_reason
        if not reason:
            reason = why_left(module, asked=True) if module is not None else "left to vLLM"
        nbytes = self.sizes.of(refusal.name, self.packed)
        left = LeftToVllm(
            refusal.name, refusal.kind, refusal.method, reason, refusal.message, nbytes
        )
        self.found.left.append(left)

    def _ours(self, name: str, module: Any) -> bool:
        """Whether ``module`` is run by this package, or shares the weight of one that is."""
        from vllm.compressed_linear.integration import embedding, linear

        method = getattr(module, "quant_method", None)
        if isinstance(method, linear.CompressedLinearMethod):
            self.found.layers.append(
                ModelLayer(
                    method.plan_name,
                    name,
                    method.plan_kind,
                    method.context(module),
                    tuple(method.sources),
                    reasons=_reasons(self.quant_config, method.prefix, method.kind),
                    notes=(method.plan_note,) * 2,
                )
            )
        elif isinstance(method, linear.DenseMethod) and method.could_take(module):
            self.found.layers.append(
                ModelLayer(
                    method.plan_name,
                    name,
                    method.kind,
                    method.context(module),
                    dense=dense_shard(method.plan_name, module.weight.data),
                    reasons=_reasons(self.quant_config, method.plan_name, method.kind),
                    notes=(method.plan_note(lookup=False), method.plan_note(lookup=True)),
                )
            )
        else:  # a tied head is shown with its table
            tied = isinstance(method, embedding.TiedHeadMethod)
            return tied or getattr(method, "table", None) is not None
        return True

    def _left(self, name: str, module: Any) -> None:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            UnquantizedEmbeddingMethod,
            VocabParallelEmbedding,
        )

        method = getattr(module, "quant_method", None)
        # Some modules have another name in the configuration than in the model.
        known_as = self.asked.names.get(id(module)) or name
        entry = self.delegated.get(known_as)
        weights = isinstance(module, (LinearBase, VocabParallelEmbedding))
        if method is not None and (entry or weights or compat.holds_experts(module)):
            if entry is not None:
                by, reason = entry.variant, entry.note
            else:
                asked = id(module) in self.asked.names
                by, reason = type(method).__name__, self.vllms_reason
                if not reason:
                    reason = why_left(module, asked=asked)
            for vllms in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
                if isinstance(method, vllms):
                    by = vllms.__name__  # our methods delegate to it
            nbytes = self.sizes.of(known_as, self.packed) or bytes_of_parameters(module)
            kind = type(module).__name__
            self.found.left.append(LeftToVllm(known_as, kind, by, reason, nbytes=nbytes))
        elif own := sum(p.nbytes for p in module.parameters(recurse=False)):
            kind = type(module).__name__
            nbytes = self.sizes.of(name, {}) if not any(module.children()) else own
            self.found.others.append(LeftToVllm(name, kind, "", NOT_LINEAR, nbytes=nbytes or own))


def _reasons(config: CompressedLinearConfig, prefix: str, kind: LayerKind) -> tuple[str, ...]:
    names = shard_names(prefix, config.packed_modules_mapping)
    found = [(name.rpartition(".")[2], config.resolve(name, kind)) for name in names]
    plain = {name: r.reason for name, r in found if isinstance(r, Unquantized)}
    if len(plain) == len(found):
        return tuple(dict.fromkeys(plain.values()))
    return tuple(f"{name}: {reason}" for name, reason in plain.items())
