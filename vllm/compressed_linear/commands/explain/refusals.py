# SPDX-License-Identifier: Apache-2.0
"""Go on building a model after one of its layers was refused, and record the refusals.

A load ends at the first refusal; the commands show all of them. The refused layer has a method of
vLLM's for unquantized layers, or no weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration.delegation import RefusedByVllmError

LONGEST_REASON = 300
"""Limit of characters for an error of another library."""


def short(error: BaseException) -> str:
    """One line of an error, without what pydantic puts around it; some list all architectures."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\d+ validation errors? for \w+ (Value|Assertion) error, ", "", text)
    text = re.sub(r" \[type=\w+_error, input_value=.*", "", text)
    text = text.removesuffix(" Reasons:")  # vLLM's list of them may be empty
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}…"


@dataclass(frozen=True)
class Refusal:
    """Why the load of a layer fails. ``ours``: the checkpoint contradicts its configuration, on
    every machine; else vLLM's code cannot run the layer here. ``reason``: why it is vLLM's."""

    name: str
    kind: str
    message: str
    ours: bool
    reason: str = ""
    method: str = ""


@dataclass
class AskedLayers:
    """Layers for which a model asked its quantization config while it was built: id of the module →
    its name in the configuration; ``refused`` by the same key. ``modules`` keeps the ids valid."""

    names: dict[int, str] = field(default_factory=dict)
    refused: dict[int, Refusal] = field(default_factory=dict)
    modules: list[Any] = field(default_factory=list)

    def watch(self, config: Any) -> None:
        """Make this quantization config (a copy) record refusals instead of raising them."""
        create: Callable[[Any, str], Any] = config.get_quant_method

        def get_quant_method(layer: Any, prefix: str) -> Any:
            self.names[id(layer)] = prefix.strip(".")
            self.modules.append(layer)
            try:
                method = create(layer, prefix)
            except Exception as error:
                self._refuse(layer, error)
                return _unquantized(layer)
            if method is not None:
                self._watch_weights(method)
            return method

        config.get_quant_method = get_quant_method

    def _watch_weights(self, method: Any) -> None:
        if "create_weights" in vars(method):  # one method for several layers
            return
        create = method.create_weights

        def create_weights(layer: Any, *args: Any, **kwargs: Any) -> None:
            try:
                create(layer, *args, **kwargs)
            except Exception as error:
                self._refuse(layer, error, type(method).__name__)

        method.create_weights = create_weights

    def _refuse(self, layer: Any, error: Exception, method: str = "") -> None:
        ours = isinstance(error, (CheckpointError, ConfigError))
        reason, message = "", short(error)
        if isinstance(error, RefusedByVllmError):
            ours, reason = False, error.reason
            message = short(error.__cause__ or error)
        name, kind = self.names[id(layer)], type(layer).__name__
        self.refused[id(layer)] = Refusal(name, kind, message, ours, reason, method)


def _unquantized(layer: Any) -> Any:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
