# SPDX-License-Identifier: Apache-2.0
"""Access to what vLLM does with the weights of a whole model: process them after loading, reload
them layer by layer, save them.

vLLM has no hooks around these. Its functions are wrapped where they are bound by name, and only in
a process that builds a model of ours.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensors = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
"""Parameters and buffers of one layer, by name."""


def wrap_reload(
    initialize: Callable[..., Any], finalize: Callable[..., Any], reload: Callable[..., Any]
) -> bool:
    """Wrap vLLM's functions that begin a reload, finish it, and do both from a path or iterator.

    Each wrapper gets the original function and then its arguments. Returns whether this vLLM has
    such functions.
    """
    try:
        from vllm.model_executor.model_loader import reload as package
        from vllm.model_executor.model_loader.reload import inplace, layerwise
    except ImportError:
        return False
    if not hasattr(layerwise, "LAYERWISE_INFO"):
        return False
    rebind(layerwise, "initialize_layerwise_reload", initialize, package)
    rebind(layerwise, "finalize_layerwise_reload", finalize, package)
    rebind(inplace, "reload_weights", reload, inplace)
    return True


def wrap_processing(process: Callable[..., Any]) -> None:
    """Wrap vLLM's function that processes the layers of a model after loading. ``process`` gets the
    original function, the model, and further arguments."""
    from vllm.model_executor.model_loader import utils

    rebind(utils, "process_weights_after_loading", process, utils)


def before_saving(check: Callable[[torch.nn.Module, str], None]) -> None:
    """Call ``check`` with the model and the name of the form before vLLM saves the tensors of a
    running model."""
    from vllm.model_executor.model_loader import sharded_state_loader, tensorizer_loader

    for form, loader in (
        ("sharded state", sharded_state_loader.ShardedStateLoader),
        ("tensorizer", tensorizer_loader.TensorizerLoader),
    ):
        _check_before_saving(loader, form, check)


def _check_before_saving(
    loader: Any, form: str, check: Callable[[torch.nn.Module, str], None]
) -> None:
    original = loader.save_model

    @functools.wraps(original)
    def save_model(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        check(model, form)
        return original(model, *args, **kwargs)

    loader.save_model = staticmethod(save_model)


def rebind(home: Any, name: str, wrapper: Callable[..., Any], public: Any) -> None:
    """Replace function ``name`` of ``home`` in ``public`` and in each module that imported it. The
    binding in ``home`` itself stays, for callers that undo what they begin (a dry run)."""
    original = getattr(home, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    for module in [public, *sys.modules.values()]:
        names = getattr(module, "__dict__", {})
        if (module is public or module is not home) and names.get(name) is original:
            setattr(module, name, wrapped)


def end_of_weight_update(ended: Callable[[torch.nn.Module], None]) -> None:
    """Call ``ended`` with the model when an update of weights by a trainer ends or fails."""
    try:
        from vllm.distributed.weight_transfer.base import WeightTransferEngine
    except ImportError:
        return
    original = WeightTransferEngine.reset_weight_update_target

    def reset_weight_update_target(self: Any) -> None:
        ended(self.model)
        original(self)

    WeightTransferEngine.reset_weight_update_target = reset_weight_update_target


def is_deferred_attention(layer: torch.nn.Module) -> bool:
    """Whether vLLM processes ``layer`` after all others, because it derives tensors from them."""
    from vllm.model_executor.layers.attention import is_deferred_attention_layer

    return bool(is_deferred_attention_layer(layer))


class LayerRecord:
    """vLLM's record of one layer during a reload."""

    def __init__(self, layer: torch.nn.Module) -> None:
        from vllm.model_executor.model_loader.reload import layerwise

        self._functions = layerwise
        self._info = layerwise.get_layerwise_info(layer)
        self.layer = layer

    @property
    def is_open(self) -> bool:
        """Whether the layer waits for weights."""
        return bool(self._info.can_load())

    @property
    def elements_loaded(self) -> int:
        return int(self._info.load_numel)

    @property
    def elements_expected(self) -> int:
        return int(self._info.load_numel_total or 0)

    def arrivals(self) -> list[tuple[str, Any]]:
        """The list to which vLLM appends (tensor name, arguments) of each load of this reload."""
        arrivals: list[tuple[str, Any]] = self._info.loaded_weights
        return arrivals

    def take_running_tensors(self) -> Tensors | None:
        """The tensors that the layer had before. Without them, vLLM keeps new tensors on the layer
        instead of copying them over the old ones."""
        tensors: Tensors | None = self._info.kernel_tensors
        self._info.kernel_tensors = None
        return tensors

    def give_running_tensors(self, tensors: Tensors | None) -> None:
        self._info.kernel_tensors = tensors

    def process(self) -> None:
        """Load what has arrived and process it."""
        self._functions._layerwise_process(self.layer, self._info)

    def place(self, tensors: Tensors, non_persistent: set[str]) -> None:
        """Make ``tensors`` the tensors of the layer, and close the record."""
        self._info.kernel_tensors = tensors
        self._info.kernel_non_persistent_buffers = non_persistent
        self._functions._place_kernel_tensors(self.layer, self._info)
        self._info.reset()


def named_source(config: Any) -> Mapping[str, Any]:
    """The fields by which a model's config names its weights; a reload from a path changes them."""
    names = ("model", "model_weights", "revision")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
