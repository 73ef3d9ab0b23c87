# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of MLX: every width and mode, divided among ranks, damaged, and early ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.changed_checkpoints import changed_copy
from tests.support.checkpoints import checkpoint, checkpoint_reference
from tests.support.damages import untold_damages
from tests.support.explained import explained
from tests.support.mlx_store import MlxWeight
from tests.support.model_loading import loaded, logits
from tests.support.shards import assert_ranks_hold_the_whole
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

VARIANTS = {
    **{f"affine-{bits}": MlxWeight(bits=bits, group=32) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": MlxWeight("mxfp4", 4, 32),
    "mxfp8": MlxWeight("mxfp8", 8, 32),
    "nvfp4": MlxWeight("nvfp4", 4, 16),
}


@pytest.mark.parametrize(("axis", "ranks"), [("n", 2), ("k", 2), ("n", 4), ("k", 4)])
@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_hold_the_parts_of_a_weight(name: str, axis: str, ranks: int) -> None:
    store = VARIANTS[name]
    assert_ranks_hold_the_whole(store.config, store, axis, ranks, 208, 384)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_damage_of_a_tensor_is_right_or_told(name: str) -> None:
    store = VARIANTS[name]
    others = [f"biases {what}" for what in ("with 0.0", "with 3e+38", "zeros")]  # as good as any
    assert untold_damages(store.config, store, 208, 384, others) == []


def test_early_files_with_the_configuration_under_its_own_name_only(tmp_path: Path) -> None:
    """mlx-lm wrote ``quantization`` without a mode, and no ``quantization_config``."""
    name = "mlx-w4-g64"
    path = changed_copy(name, tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"], config["quantization"]["mode"]
    (path / "config.json").write_text(json.dumps(config))
    reference = checkpoint_reference(name)
    with loaded(path, "float32") as model:
        ours = torch.log_softmax(logits(model, reference["input_ids"]), -1)
    assert {entry.backend for entry in PROCESS_PLAN.entries.values()} == {"cpu"}
    assert float((ours - torch.log_softmax(reference["logits"], -1)).abs().max()) <= 1e-4


def test_explain_names_the_format_that_the_file_does_not_name() -> None:
    found = explained(checkpoint("mlx-mixed"))
    assert found.quant_method == "mlx"
    assert {case.parts[0].backend for layer in found.layers for case in layer.cases} == {"cpu"}
