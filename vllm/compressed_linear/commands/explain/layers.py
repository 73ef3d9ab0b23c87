# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a model as vLLM will build them, without its weights.

The model class itself is constructed on the meta device, so names, fused shards and the split among
ranks are those of a real load for every architecture.
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
"""Characters of another library's error that are worth repeating."""


class ModelUnavailableError(RuntimeError):
    """vLLM's class for a model cannot be built here; the message says why."""


class TensorParallelError(ValueError):
    """The model cannot be split among that many ranks."""


@dataclass(frozen=True)
class LayerLayout:
    """One layer that this package will run.

    ``name``: what the model class calls it, and the plan. ``path``: where it is in the model.
    ``sources``: the shards of a layer of which at least one is quantized. ``dense``: this rank's
    weight (a meta tensor) of an unquantized one. ``reasons``: which rule left which shard
    unquantized. ``notes``: what else the plan says, if rows are not looked up in the prepared copy
    and if they are.
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
    """A layer with weights that vLLM's own code runs, and why. ``refusal``: what that code says if
    it will not run it on this machine. ``nbytes``: of its weights, where vLLM keeps them as they
    are."""

    name: str
    kind: str
    method: str
    reason: str
    refusal: str = ""
    nbytes: int = 0


@dataclass
class ModelLayout:
    """All linear layers of one rank, in the model's order. ``headers`` have vLLM's names;
    ``stacked``: parts of fused tensors that only the model class's mapper knows."""

    layers: list[LayerLayout] = field(default_factory=list)
    left: list[LeftToVllm] = field(default_factory=list)
    headers: Headers = field(default_factory=lambda: Headers({}))
    stacked: Stacked = field(default_factory=dict)
    dtype: str = ""
    model_class: str = ""


def model_layouts(
    path: Path, architectures: Sequence[str], *, tp_size: int, dtype: str, quantized: bool
) -> list[ModelLayout]:
    """The layout on every rank.

    Raises ``ModelUnavailableError`` when the class cannot be built, ``TensorParallelError`` when
    the model cannot be split so, and what loading would raise for a bad configuration.
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
    return [_layout(config, rank) for rank in range(tp_size)]


def _unavailable(error: Exception) -> Exception:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return cause
        cause = cause.__cause__ or cause.__context__
    # pydantic's messages list every architecture there is.
    text = " ".join(str(error).split())
    return ModelUnavailableError(f"{type(error).__name__}: {text[:LONGEST_REASON]}")


def _layout(config: Any, rank: int) -> ModelLayout:
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
    layout = ModelLayout(
        headers=headers,
        stacked=meta_model.stacked_names(model, dict(zip(on_disk, headers, strict=True))),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        model_class=type(model).__name__,
    )
    for name, module in model.named_modules():
        if name in refused:
            layout.left.append(refused[name])
        else:
            _add(layout, name, module, quant_config, delegated)
    return layout


class _SurvivingDelegation(Delegation):
    """Where vLLM's code will not run a layer that is left to it, notes that and goes on."""

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
    layout: ModelLayout,
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
        layout.left.append(LeftToVllm(name, entry.kind, entry.variant, entry.note))
    elif isinstance(method, linear.CompressedLinearMethod):
        layout.layers.append(
            LayerLayout(
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
        layout.layers.append(
            LayerLayout(
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
            by = UnquantizedEmbeddingMethod.__name__  # ours leaves it to that one
            nbytes = module.weight.nbytes
        layout.left.append(LeftToVllm(name, type(module).__name__, by, reason, nbytes=nbytes))


def _reasons(config: CompressedLinearConfig, prefix: str, kind: LayerKind) -> tuple[str, ...]:
    names = shard_names(prefix, config.packed_modules_mapping)
    found = [(name.rpartition(".")[2], config.resolve(name, kind)) for name in names]
    plain = {name: r.reason for name, r in found if isinstance(r, Unquantized)}
    if len(plain) == len(found):
        return tuple(dict.fromkeys(plain.values()))
    return tuple(f"{name}: {reason}" for name, reason in plain.items())
