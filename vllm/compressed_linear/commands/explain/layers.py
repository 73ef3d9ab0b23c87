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

from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.headers import Headers, shard_names
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource, dense_shard
from vllm.compressed_linear.commands.explain import meta_model
from vllm.compressed_linear.commands.explain.tensors import Stacked
from vllm.compressed_linear.formats.base import Format
from vllm.compressed_linear.formats.resolution import ConfigError, LayerKind, Unquantized
from vllm.compressed_linear.integration.config import NAME, CompressedLinearConfig
from vllm.compressed_linear.integration.delegation import Delegation
from vllm.compressed_linear.integration.registration import register_with_vllm
from vllm.compressed_linear.prepare.plan import DELEGATED, Plan, PlanEntry

LONGEST_REASON = 160
"""Limit of characters for an error of another library."""


class ModelUnavailableError(RuntimeError):
    """vLLM's model class cannot be built here; the message says why."""


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


@dataclass(frozen=True)
class LeftToVllm:
    """A layer with weights that vLLM's own code runs, and why. ``refusal``: error of that code if
    it cannot run it on this machine. ``nbytes``: of its weights, if vLLM keeps them unchanged."""

    name: str
    kind: str
    method: str
    reason: str
    refusal: str = ""
    nbytes: int = 0


@dataclass
class ModelLayers:
    """All linear layers of one rank, in the model's order. ``headers`` have vLLM's names;
    ``stacked``: parts of fused tensors that only the model class's mapper knows."""

    layers: list[ModelLayer] = field(default_factory=list)
    left: list[LeftToVllm] = field(default_factory=list)
    headers: Headers = field(default_factory=lambda: Headers({}))
    stacked: Stacked = field(default_factory=dict)
    dtype: str = ""
    model_class: str = ""


def model_layers(
    path: Path, architectures: Sequence[str], *, tp_size: int, dtype: str, quantized: bool
) -> list[ModelLayers]:
    """The layers of each rank.

    Raises ``ModelUnavailableError`` if the class cannot be built, ``TensorParallelError`` if the
    model cannot be split so, and the errors of loading for an invalid configuration.
    """
    register_with_vllm()
    try:
        meta_model.inspect_models_here(list(architectures))
        config = meta_model.engine_config(
            str(path), dtype=dtype, tp_size=tp_size, quantization=None if quantized else NAME
        )
    except Exception as error:
        raise _unavailable(error) from error
    try:
        meta_model.check_tensor_parallel(config)
    except ValueError as error:
        raise TensorParallelError(str(error)) from error
    if not isinstance(config.quant_config, CompressedLinearConfig):
        found = type(config.quant_config).__name__
        raise ModelUnavailableError(f"vLLM would read this checkpoint with its own {found}")
    return [_layers_of_rank(config, rank) for rank in range(tp_size)]


def _unavailable(error: Exception) -> Exception:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return cause
        cause = cause.__cause__ or cause.__context__
    # pydantic's messages list all architectures.
    text = " ".join(str(error).split())
    return ModelUnavailableError(f"{type(error).__name__}: {text[:LONGEST_REASON]}")


def _layers_of_rank(config: Any, rank: int) -> ModelLayers:
    plan = Plan()
    refused: dict[str, LeftToVllm] = {}

    def survive(copied: CompressedLinearConfig) -> None:
        copied.plan = plan
        copied.delegation = _SurvivingDelegation(copied.format, refused)

    try:
        model, quant_config = meta_model.build_on_meta(config, rank, survive)
    except Exception as error:
        raise _unavailable(error) from error
    delegated = {e.name: e for e in plan.entries.values() if e.backend == DELEGATED}
    headers = quant_config.file.headers or Headers({})
    on_disk = config.quant_config.file.headers or ()
    found = ModelLayers(
        headers=headers,
        stacked=meta_model.stacked_names(model, dict(zip(on_disk, headers, strict=True))),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        model_class=type(model).__name__,
    )
    for name, module in model.named_modules():
        if name in refused:
            found.left.append(refused[name])
        else:
            _add(found, name, module, quant_config, delegated)
    return found


class _SurvivingDelegation(Delegation):
    """Delegation that records refusals of vLLM's code instead of raising them."""

    def __init__(self, found: Format, refused: dict[str, LeftToVllm]) -> None:
        super().__init__(found)
        self._refused = refused

    def create_quant_method(
        self,
        layer: Any,
        prefix: str,
        reason: str,
        packed_modules: dict[str, list[str]],
        plan: Plan,
    ) -> Any:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        try:
            return super().create_quant_method(layer, prefix, reason, packed_modules, plan)
        except ConfigError:
            raise
        except Exception as error:
            refusal = " ".join(str(error.__cause__ or error).split())[:LONGEST_REASON]
            kind = type(layer).__name__
            self._refused[prefix] = LeftToVllm(prefix, kind, "", reason, refusal)
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _add(
    found: ModelLayers,
    name: str,
    module: Any,
    quant_config: CompressedLinearConfig,
    delegated: dict[str, PlanEntry],
) -> None:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    from vllm.compressed_linear.integration import embedding, linear

    method = getattr(module, "quant_method", None)
    if method is None:
        return
    if name in delegated:
        entry = delegated[name]
        found.left.append(LeftToVllm(name, entry.kind, entry.variant, entry.note))
    elif isinstance(method, linear.CompressedLinearMethod):
        found.layers.append(
            ModelLayer(
                method.plan_name,
                name,
                method.plan_kind,
                method.context(module),
                tuple(method.sources),
                reasons=_reasons(quant_config, method.prefix, method.kind),
                notes=(method.plan_note,) * 2,
            )
        )
    elif isinstance(method, linear.DenseMethod) and method.could_take(module):
        found.layers.append(
            ModelLayer(
                method.plan_name,
                name,
                method.kind,
                method.context(module),
                dense=dense_shard(method.plan_name, module.weight.data),
                reasons=_reasons(quant_config, method.plan_name, method.kind),
                notes=(method.plan_note(lookup=False), method.plan_note(lookup=True)),
            )
        )
    elif isinstance(method, embedding.TiedHeadMethod) or getattr(method, "table", None) is not None:
        return  # shown with the table
    elif isinstance(module, (LinearBase, VocabParallelEmbedding)):
        reason, nbytes = "embedding tables are only looked up", 0
        by = type(method).__name__
        if isinstance(module, LinearBase):
            reason = f"{type(module).__name__} is one of vLLM's special cases"
        elif isinstance(method, UnquantizedEmbeddingMethod):
            by = UnquantizedEmbeddingMethod.__name__  # our method delegates to it
            nbytes = module.weight.nbytes
        found.left.append(LeftToVllm(name, type(module).__name__, by, reason, nbytes=nbytes))


def _reasons(config: CompressedLinearConfig, prefix: str, kind: LayerKind) -> tuple[str, ...]:
    names = shard_names(prefix, config.packed_modules_mapping)
    found = [(name.rpartition(".")[2], config.resolve(name, kind)) for name in names]
    plain = {name: r.reason for name, r in found if isinstance(r, Unquantized)}
    if len(plain) == len(found):
        return tuple(dict.fromkeys(plain.values()))
    return tuple(f"{name}: {reason}" for name, reason in plain.items())
