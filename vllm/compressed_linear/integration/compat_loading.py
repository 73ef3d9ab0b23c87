# SPDX-License-Identifier: Apache-2.0
"""Access to vLLM's model loaders, and to what they leave out on purpose, by feature detection."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Loading:
    """One model that vLLM is about to load: ``load_weights()`` does it."""

    model: Any
    model_config: Any
    vllm_config: Any
    load_weights: Callable[[], None]


@dataclass
class BeingLoaded:
    """The model that vLLM builds and loads now, in this process: the drafter while a target's
    drafter is loaded. ``model``: None while it is built."""

    vllm_config: Any
    model_config: Any
    load_config: Any
    model: Any = None


_BEING_LOADED: list[BeingLoaded] = []


def being_loaded() -> BeingLoaded | None:
    """None outside of vLLM's loaders."""
    return _BEING_LOADED[-1] if _BEING_LOADED else None


Around = Callable[[Loading], None]
"""Called for each model that is loaded; has to call ``load_weights``."""


def call_around_loading(around: Around) -> None:
    """Let every loader of vLLM call ``around`` once the model is built, in place of its own
    ``load_weights``. Idempotent.

    Loaders that restore a model in their own way (``load_model``) are not affected.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    original: Any = BaseModelLoader.load_model
    if getattr(original, "compressed_linear", False):
        return

    @functools.wraps(original)
    def load_model(
        self: Any, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        own = self.load_weights

        def load_weights(model: Any, config: Any) -> None:
            loading.model = model
            around(Loading(model, config, vllm_config, lambda: own(model, config)))

        self.load_weights = load_weights
        loading = BeingLoaded(vllm_config, model_config, self.load_config)
        _BEING_LOADED.append(loading)
        try:
            return original(self, vllm_config, model_config, *args, **kwargs)
        finally:
            _BEING_LOADED.pop()
            del self.load_weights

    load_model.compressed_linear = True  # type: ignore[attr-defined]
    BaseModelLoader.load_model = load_model


def quantization_configs(loading_model: Any, vllm_config: Any) -> list[Any]:
    """The quantization configs of a model's layers. Drafters have one of their own."""
    found = [getattr(vllm_config, "quant_config", None)]
    found += [getattr(module, "quant_config", None) for module in loading_model.modules()]
    return list({id(config): config for config in found if config is not None}.values())


def fills_itself(module: Any, name: str) -> bool:
    """Whether vLLM gives the parameter ``name`` of ``module`` a value if the checkpoint has none:
    scales of a KV cache, parameters built from the quantization config or while weights are
    quantized online, maps of experts to ranks, and biases of experts in case the files have some
    that the model's class does not declare."""
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
    from vllm.model_executor.model_loader import default_loader
    from vllm.model_executor.model_loader.reload import meta

    method = getattr(module, "quant_method", None)
    loaded = {"e_score_correction_bias"}  # reloading has other reasons to leave it alone
    built = set(getattr(default_loader, "_CONFIG_BUILT_PARAMS", ()))
    built |= set(getattr(meta, "SKIP_LOAD_TENSORS", ())) - loaded
    return (
        isinstance(method, BaseKVCacheMethod)
        or bool(getattr(method, "uses_meta_device", False))
        or name in built
        or _is_undeclared_bias_of_experts(module, name)
    )


def _is_undeclared_bias_of_experts(module: Any, name: str) -> bool:
    """vLLM allocates zeros for them with GPTQ, and removes them if nothing was loaded."""
    loaded = getattr(module, "_loaded_expert_biases", None)
    declared = getattr(getattr(module, "moe_config", None), "has_bias", True)
    return (
        loaded is not None
        and name in ("w13_bias", "w2_bias")
        and name not in loaded
        and not declared
    )


def padding(parameter: torch.Tensor) -> int:
    """Number of elements of ``parameter`` that are padding, as its creator declares."""
    return parameter.numel() - int(getattr(parameter, "weight_loader_numel", parameter.numel()))


def is_head_without_use(model: Any, module: Any) -> bool:
    """Whether ``module`` is the output head of a model that pools, so nothing computes with it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(module, ParallelLMHead) and bool(getattr(model, "is_pooling_model", False))


def comes_from_target(model: Any, name: str, module: Any, loading: Loading) -> bool:
    """Whether ``module``, of the drafter ``model``, is replaced by the target's after loading."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    speculative = getattr(loading.vllm_config, "speculative_config", None)
    if (
        speculative is None
        or loading.model_config is not getattr(speculative, "draft_model_config", None)
        or getattr(speculative, "method", "") == "draft_model"
    ):
        return False
    if name.endswith("draft_id_to_target_id"):
        config = getattr(model, "config", None)
        sizes = [getattr(config, size, None) for size in ("draft_vocab_size", "vocab_size")]
        return sizes[0] == sizes[1]
    if isinstance(module, ParallelLMHead):
        return not getattr(model, "has_own_lm_head", False)
    own = getattr(model, "has_own_embed_tokens", False)
    return isinstance(module, VocabParallelEmbedding) and not own


class LeftOut:
    """What a model of vLLM leaves out of a checkpoint on purpose, by names in the files."""

    def __init__(self, model: Any, config: Any, vllm_config: Any) -> None:
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
        from vllm.model_executor.models import utils

        mapper: Any = getattr(model, "hf_to_vllm_mapper", None) or utils.WeightsMapper()
        for other in (
            config.get_cache_scale_mapper(),
            config.get_checkpoint_weight_mapper(),
            getattr(utils.AutoWeightsLoader, "REMOVE_UNUSED_ROTARY_EMBEDS_MAPPER", None),
        ):
            mapper = mapper if other is None else mapper | other
        self._map = mapper.map_name
        self._model = model
        self._utils = utils
        self._suffixes = tuple(getattr(QuantizationConfig, "_ignore_unexpected_suffixes", ()))
        self._tied: Iterable[str] = getattr(utils, "_get_tied_embedding_params", lambda model: ())(
            model
        )
        self._modules = {name for name, _ in model.named_modules()}
        self._towers = _parts_that_see(model, "tower_model")
        parallel = vllm_config.parallel_config
        self._ranks_share_experts = bool(parallel.enable_expert_parallel)
        model_config = vllm_config.model_config
        self._hf_config = getattr(model_config, "hf_text_config", None)

    def __contains__(self, name: str) -> bool:
        mapped = self._map(name)
        if mapped is None or mapped.endswith(self._suffixes):
            return True
        layer_of_drafter = getattr(self._utils, "get_spec_layer_idx_from_weight_name", None)
        # Towers are built up to the layer whose output is used, and without heads.
        in_tower = any(mapped.startswith(f"{tower}.") for tower in self._towers)
        return (
            mapped in self._tied
            or (in_tower and mapped.rpartition(".")[0] not in self._modules)
            or self._utils.is_pp_missing_parameter(mapped, self._model)
            or (self._ranks_share_experts and ".experts." in mapped)
            or (
                layer_of_drafter is not None
                and self._hf_config is not None
                and layer_of_drafter(self._hf_config, mapped) is not None
            )
        )


def _parts_that_see(model: Any, *kinds: str) -> tuple[str, ...]:
    """Names of the modules that encode images and sound (``tower_model``), and of those that make
    embeddings of these (``connector``), as the model's class tells."""
    mapping = getattr(model, "get_mm_mapping", None)
    if mapping is None:
        return ()
    found: list[str] = []
    for kind in kinds:
        names = getattr(mapping(), kind, None) or ()
        found += [names] if isinstance(names, str) else names
    return tuple(found)


def is_linear_that_sees(model: Any, name: str, layer: Any) -> bool:
    """Whether ``layer`` is a plain linear layer of what encodes images and sound. A model's class
    may leave the choice to quantize it to the name of the quantization config; nothing reads its
    weight but its own method."""
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        ReplicatedLinear,
        RowParallelLinear,
    )

    parts = _parts_that_see(model, "tower_model", "connector")
    return type(layer) in (ReplicatedLinear, ColumnParallelLinear, RowParallelLinear) and any(
        name == part or name.startswith(f"{part}.") for part in (p.rstrip(".") for p in parts)
    )


def batch_statistics(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that vLLM's loader takes from files as if they were parameters: running means and
    variances of batch norms."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for buffer in ("running_mean", "running_var"):
                if isinstance(tensor := getattr(module, buffer, None), torch.Tensor):
                    yield f"{name}.{buffer}" if name else buffer, tensor


def renaming_of_weights(model: Any) -> Callable[[str], str]:
    """Function from a module's name to the one under which the model loads its plain weight."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)

    def module_of(name: str) -> str:
        renamed = None if mapper is None else mapper.map_name(f"{name}.weight")
        return name if renamed is None else str(renamed).rpartition(".")[0]

    return module_of


def record_layout(layer: torch.nn.Module) -> None:
    """Let a reload restore the parameters that ``layer`` has now."""
    try:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import capture_layer_to_meta
    except ImportError:
        return
    get_layerwise_info(layer).restore_metadata = capture_layer_to_meta(layer)
