# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as a worker of vLLM activates them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.model_loading import LoadedModel


def with_adapters(model: LoadedModel) -> Any:
    """vLLM's manager, which replaces the model's layers by its LoRA layers, as a worker does."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    manager = LRUCacheWorkerLoRAManager(
        model.config, torch.device("cpu"), model.model.embedding_modules
    )
    model.model = manager.create_lora_manager(model.model, model.config)
    return manager


def activate(manager: Any, adapter: Path | None, tokens: int, *, prefill: bool = True) -> None:
    """For one prompt of ``tokens``, or for so many requests that decode: then also of the head."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest

    requests = {LoRARequest("adapter", 1, str(adapter))} if adapter else set()
    identifier = 1 if adapter else 0
    requested = 1 if prefill else tokens
    mapping = LoRAMapping((identifier,) * tokens, (identifier,) * requested, is_prefill=prefill)
    manager.set_active_adapters(requests, mapping)
