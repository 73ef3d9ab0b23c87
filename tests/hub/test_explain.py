# SPDX-License-Identifier: Apache-2.0
"""`explain` on published configurations with files of full size: what runs here, and what does not
and why. docs/published-checkpoints.md has the table of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.hub.checkpoints import HUB, published
from tests.support.hub.table import PAGE, row, rows

pytestmark = pytest.mark.usefixtures("inspect_in_process", "torchvision")

RUN_WHOLLY = [
    "Qwen-Qwen2.5-7B-Instruct-AWQ",
    "Qwen-Qwen3.5-27B-GPTQ-Int4",
    "RedHatAI-Llama-4-Scout-17B-16E-Instruct-quantized.w4a16",
    "google-gemma-4-31B-it-qat-w4a16-ct",
    "neuralmagic-2024",
    "user14-Qwen3.8-27B-W4A16-AutoRound-GPTQ",
]
"""With one path of each kind to all of their linear layers, but for routed experts."""


def test_every_published_configuration_has_a_row() -> None:
    assert len(published()) == len(list(HUB.glob("*.json"))) >= 99
    page = PAGE.read_text()
    for one in published().values():
        assert f"| {one.name} | {one.architecture} |" in page


@pytest.mark.parametrize("name", RUN_WHOLLY)
def test_what_is_quantized_runs_here(name: str, tmp_path: Path) -> None:
    _, _, _, ours, left, refused = row(published()[name], tmp_path / "checkpoint")
    assert "reference" not in ours
    assert int(ours.split()[0]) >= 28
    assert left in ("", "48: the experts of a mixture")
    assert refused == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", published())
def test_the_table_is_what_explain_says(name: str) -> None:
    (cells,) = rows([name])
    assert f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" in PAGE.read_text()
