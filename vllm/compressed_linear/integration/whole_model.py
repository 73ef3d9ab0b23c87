# SPDX-License-Identifier: Apache-2.0
"""What concerns the weights of a whole model: when its plan is complete, and how it may be saved.

Layers that a model creates and drops, replaces or ties before it is processed do not count: the
plan covers the layers that the model has when vLLM processes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import cache
from typing import Any

import torch

from vllm.compressed_linear.integration import compat_weights
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN, ModelPreparation, report


class OurMethod:
    """Base of our quantization methods, as far as the whole model is concerned."""

    model: ModelPreparation
    plain_table: Any = None
    """The embedding table, of torch's class, whose weight is the layer's."""

    def settle(self, layers: Set[torch.nn.Module]) -> None:
        """The model is built and loaded, and has these ``layers``: forget others."""

    def waiting(self, layer: Any) -> list[torch.Tensor]:
        """The checkpoint's tensors on ``layer`` that are going to be prepared."""
        raise NotImplementedError

    def absent(self, layer: Any, arrived: Sequence[tuple[str, Any]]) -> str:
        """The first tensor of ``layer`` that a whole checkpoint has and that has not ``arrived``;
        empty if there is none. ``arrived``: name of the parameter and shard id of each load."""
        return "" if arrived else ", ".join(layer._parameters)


class UnsavableError(RuntimeError):
    """The tensors of a running model cannot be saved in a form that loads again."""


def method_of(layer: torch.nn.Module) -> OurMethod | None:
    """Our method of a layer, or None if it has none of ours."""
    method = getattr(layer, "quant_method", None)
    return method if isinstance(method, OurMethod) else None


def is_ours(model: torch.nn.Module) -> bool:
    """Whether a layer of ``model`` has a method of ours."""
    return any(method_of(layer) is not None for layer in model.modules())


def allows_missing(model: torch.nn.Module) -> bool:
    """Whether the user lets ``model`` be loaded without some of its tensors."""
    methods = (method_of(layer) for layer in model.modules())
    return any(m.model.settings.allow_missing for m in methods if m is not None)


@cache
def watch_models() -> None:
    """Follow the models that vLLM processes and saves in this process."""
    compat_weights.wrap_processing(_process)
    compat_weights.before_saving(_refuse_to_save)


def _process(
    original: Callable[..., Any], model: torch.nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """Wrapper of vLLM's ``process_weights_after_loading`` of a model."""
    plans = PROCESS_PLAN.loading()
    methods = [(layer, method_of(layer)) for layer in model.modules()]
    ours = [(layer, method) for layer, method in methods if method is not None]
    layers = {layer for layer, _ in methods}
    for _, method in ours:
        method.settle(layers)
    for plan in plans:
        waiting = [method.waiting(layer) for layer, method in ours if method.model.plan is plan]
        plan.begin(
            sum(bool(tensors) for tensors in waiting),
            sum(tensor.nbytes for tensors in waiting for tensor in tensors),
        )
    try:
        result = original(model, *args, **kwargs)
    finally:
        for plan in plans:
            plan.end()
    tune_file = next((method.model.settings.tune_file for _, method in ours), "")
    for plan in plans:
        if plan.entries:
            report(plan, tune_file)
    return result


def _refuse_to_save(model: torch.nn.Module, form: str) -> None:
    if is_ours(model):
        raise UnsavableError(
            f"The model cannot be saved as {form}: compressed_linear keeps its weights in the form "
            "that the kernels of this machine read, which no loader takes. Serve the original "
            "checkpoint; VLLM_COMPRESSED_LINEAR_CACHE keeps prepared weights for fast starts"
        )
