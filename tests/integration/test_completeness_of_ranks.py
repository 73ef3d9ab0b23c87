# SPDX-License-Identifier: Apache-2.0
"""Ranks miss only what is missing. Those of a pipeline leave out the layers of others silently."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.architectures import FAMILIES, write
from tests.support.edited import edited
from tests.support.messages import says
from tests.support.model_loading import free_port
from tests.support.repository import ROOT, environment
from tests.support.synthetic import Quant

NORM = "model.layers.1.input_layernorm.weight"
TABLE = "model.embed_tokens.weight"
EXTRA = "model.layers.0.act.scales"


def loaded_on_two_ranks(kind: str, path: Path, dropped: str) -> list[list[dict[str, Any]]]:
    """What each rank says of two complete models, each followed by one without ``dropped`` and with
    a tensor that nothing takes."""
    paths = []
    for family in ("gemma-tied", "mixtral"):
        found = write(FAMILIES[family], Quant("gptq"), path / family, reference=False)
        changed = path / f"{family}-edited"
        edited(found.quantized, changed, drop=[dropped], add={EXTRA: torch.ones(2)})
        paths += [str(found.quantized), str(changed)]
    port = str(free_port())
    worker = [sys.executable, "-m", "tests.support.completeness_worker", kind]
    ranks = [
        subprocess.Popen(
            [*worker, str(rank), "2", port, *paths],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [json.loads(rank.communicate(timeout=300)[0].splitlines()[-1]) for rank in ranks]


def test_each_rank_of_a_tensor_parallel_group_checks_its_part(tmp_path: Path) -> None:
    said = loaded_on_two_ranks("tensor", tmp_path, TABLE)
    for rank in said:
        for complete in (0, 2):
            assert rank[complete] == {"error": "", "warnings": []}
        for incomplete in (1, 3):
            assert says(rank[incomplete]["error"], TABLE, "float32 [256, 128]")
            (warning,) = rank[incomplete]["warnings"]
            assert says(warning, EXTRA)


@pytest.mark.slow
def test_each_rank_of_a_pipeline_checks_the_layers_it_has(tmp_path: Path) -> None:
    said = loaded_on_two_ranks("pipeline", tmp_path, NORM)
    for complete in (0, 2):
        assert [rank[complete] for rank in said] == [{"error": "", "warnings": []}] * 2
    for incomplete in (1, 3):
        first, last = (rank[incomplete] for rank in said)
        assert first["error"] == ""
        (warning,) = first["warnings"]
        assert says(warning, EXTRA)
        assert says(last["error"], NORM)
        assert last["warnings"] == []
