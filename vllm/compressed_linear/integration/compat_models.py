# SPDX-License-Identifier: Apache-2.0
"""Access to what vLLM's models do with the tensors of a checkpoint before they reach a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch

from vllm.compressed_linear.integration.compat_weights import rebind


@cache
def complete_zero_biases() -> None:
    """Let models of the Whisper family fill the bias of every key projection.

    Their key projections have no bias in the file and one in the fused layer, for which vLLM makes
    zeros. It recognizes key projections by ``weight`` or ``weight_packed`` only.
    """
    try:
        from vllm.model_executor.models import whisper
    except ImportError:  # for example of an audio library
        return
    if hasattr(whisper, "_create_fake_bias_for_k_proj"):
        rebind(whisper, "_create_fake_bias_for_k_proj", _with_zero_biases, whisper)


def _with_zero_biases(
    original: Callable[..., Iterable[tuple[str, torch.Tensor]]],
    weights: Iterable[tuple[str, torch.Tensor]],
    weight_name: str,
    *args: Any,
    **kwargs: Any,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that ``original`` yields, and a zero bias for each key projection without one
    whose sibling of values has one."""
    key = weight_name.removesuffix(".weight_packed").removesuffix(".weight") + "."
    value = key.replace("k", "v", 1)  # .k_proj. and .v_proj., .wk. and .wv.
    keys: dict[str, None] = {}
    biases: dict[str, torch.Tensor] = {}
    for name, tensor in original(weights, weight_name, *args, **kwargs):
        module, _, last = name.rpartition(".")
        if last == "bias":
            biases[f"{module}."] = tensor
        elif f"{module}.".endswith(key):
            keys[f"{module}."] = None
        yield name, tensor
    for module in keys:
        sibling = biases.get(module.removesuffix(key) + value)
        if module not in biases and sibling is not None:
            yield f"{module}bias", torch.zeros_like(sibling)
