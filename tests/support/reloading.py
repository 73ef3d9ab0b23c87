# SPDX-License-Identifier: Apache-2.0
"""vLLM's own weight reload."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.model_loading import LoadedModel


def reload(model: LoadedModel, path: Path) -> None:
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    reload_weights(
        model.config,
        model.model,
        weights_iterator=None,
        weights_path=str(path),
        is_checkpoint_format=True,
    )


def worst_error(ours: torch.Tensor, reference: dict[str, torch.Tensor]) -> float:
    error = torch.log_softmax(ours, -1) - torch.log_softmax(reference["logits"], -1)
    return float(error.abs().max())
