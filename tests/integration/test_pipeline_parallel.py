# SPDX-License-Identifier: Apache-2.0
"""Ranks of a pipeline miss only what is missing, and leave out the layers of others silently."""

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
EXTRA = "model.layers.0.act.scales"


@pytest.mark.slow
def test_each_rank_checks_the_layers_it_has(tmp_path: Path) -> None:
    paths = []
    for family in ("gemma-tied", "mixtral"):
        found = write(FAMILIES[family], Quant("gptq"), tmp_path / family, reference=False)
        changed = tmp_path / f"{family}-edited"
        edited(found.quantized, changed, drop=[NORM], add={EXTRA: torch.ones(2)})
        paths += [str(found.quantized), str(changed)]
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.pipeline_worker", str(rank), "2", port, *paths],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said: list[list[dict[str, Any]]] = [
        json.loads(rank.communicate(timeout=300)[0].splitlines()[-1]) for rank in ranks
    ]
    for complete in (0, 2):
        assert [rank[complete] for rank in said] == [{"error": "", "warnings": []}] * 2
    for incomplete in (1, 3):
        first, last = (rank[incomplete] for rank in said)
        assert first["error"] == ""
        (warning,) = first["warnings"]
        assert says(warning, EXTRA)
        assert says(last["error"], NORM)
        assert last["warnings"] == []
