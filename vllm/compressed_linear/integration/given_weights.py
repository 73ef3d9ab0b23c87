# SPDX-License-Identifier: Apache-2.0
"""Weights as the loader of a model of vLLM has to be given them, while it loads and reloads.

Its ``load_weights`` would take every tensor of every file, by the name and with the numbers that it
has there. Some do not count, some have another name in the model, and some mean something else to
vLLM's classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch

from vllm.compressed_linear.checkpoint.superseded import Superseded
from vllm.compressed_linear.integration.zeros_of_experts import ZerosOfExperts

Weights = Iterable[tuple[str, torch.Tensor]]

_GIVEN: WeakKeyDictionary[torch.nn.Module, GivenWeights] = WeakKeyDictionary()


def under_other_names(
    weights: Weights, moved: Mapping[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """``weights`` with those of the modules that are ``moved`` (file → model) under their names in
    the model (``unasked.ask_for_all``)."""
    for name, weight in weights:
        module, dot, tensor = name.rpartition(".")
        yield f"{moved.get(module, module)}{dot}{tensor}", weight


class GivenWeights:
    """The weights that one model is given.

    ``superseded_in``: from a checkpoint's name, "" for the one that is loaded, to its tensors that
    do not count. ``moved``: module in the files → module in the model.
    """

    def __init__(
        self,
        superseded_in: Callable[[str], Superseded],
        restated: Callable[[Weights], Weights],
        zeros_of_experts: ZerosOfExperts,
        moved: Mapping[str, str],
    ) -> None:
        self.superseded = superseded_in("")
        self._superseded_in = superseded_in
        self._restated = restated
        self._zeros_of_experts = zeros_of_experts
        self._moved = moved

    def of(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """What the model's loader is given of ``weights``. Raises ``CheckpointError`` for tensors
        that contradict each other or the configuration."""
        counting = self._restated(self.superseded.left(weights))
        return under_other_names(self._zeros_of_experts.as_vllm_reads_them(counting), self._moved)

    def read_from(self, checkpoint: str | None) -> None:
        """The next weights are those of the files at ``checkpoint``, of the files that were loaded
        (""), or of no file (None): a trainer sends them."""
        self.superseded = Superseded() if checkpoint is None else self._superseded_in(checkpoint)

    def install(self, model: Any) -> Callable[..., Any]:
        """Let ``model.load_weights`` give the class's own loader these weights from now on. Returns
        that loader."""
        if model in _GIVEN:
            del model.load_weights
        own: Callable[..., Any] = model.load_weights

        @wraps(own)
        def load_weights(weights: Weights, *args: Any, **kwargs: Any) -> Any:
            return own(self.of(weights), *args, **kwargs)

        model.load_weights = load_weights
        _GIVEN[model] = self
        return own


def given_to(model: torch.nn.Module) -> GivenWeights | None:
    """The weights that ``model`` is given; None for a model that loads as vLLM has it."""
    return _GIVEN.get(model)
