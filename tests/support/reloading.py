# SPDX-License-Identifier: Apache-2.0
"""vLLM's own weight reload, and files that it has to refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.model_loading import LoadedModel

Tensors = dict[str, torch.Tensor]


def reload(
    model: LoadedModel,
    path: Path | None,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
) -> None:
    """Reload the weights at ``path``, or those of an iterator."""
    from vllm.model_executor.model_loader.reload import inplace

    inplace.reload_weights(
        model.config,
        model.model,
        weights_iterator=weights,
        weights_path=None if path is None else str(path),
        is_checkpoint_format=True,
    )


def weight_update(model: LoadedModel) -> Any:
    """An engine by which a trainer sends weights: of vLLM's own class, without a transport."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.model_executor.model_loader import reload as functions

    class LocalEngine(WeightTransferEngine[Any, Any]):
        def __init__(self) -> None:
            self.model = self._default_model = model.model
            self.model_config = self._default_model_config = model.config.model_config

        def start_weight_update(self) -> None:
            functions.initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: Any) -> None:
            self.model.load_weights(update_info)

        def finish_weight_update(self) -> None:
            functions.finalize_layerwise_reload(self.model, self.model_config)

        init_transfer_engine = receive_weights = shutdown = update_weights

    LocalEngine.__abstractmethods__ = frozenset()
    return LocalEngine()


def rewrite(path: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a checkpoint of one file, in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def addresses(model: LoadedModel) -> dict[str, int]:
    """Address of each tensor of the running model that is not empty."""
    named = [*model.model.named_parameters(), *model.model.named_buffers()]
    return {name: tensor.data_ptr() for name, tensor in named if tensor.numel()}


def worst_error(ours: torch.Tensor, reference: dict[str, torch.Tensor]) -> float:
    error = torch.log_softmax(ours, -1) - torch.log_softmax(reference["logits"], -1)
    return float(error.abs().max())
