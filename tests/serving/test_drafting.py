# SPDX-License-Identifier: Apache-2.0
"""``LLM(speculative_config=...)``: every draft of a drafter that foresees its target is accepted,
and the tokens are those without speculation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import checkpoint, checkpoint_reference
from tests.support.drafters import (
    VOCABULARY,
    Eagle3,
    after,
    write_clock,
    write_clock_with_mtp,
    write_eagle3,
)
from tests.support.model_loading import loaded, logits
from tests.support.repository import environment
from tests.support.table_models import Bits, TableModel

pytestmark = pytest.mark.e2e
TOKENS = 24


def draft(model: Path, tmp_path: Path, drafter: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What ``drafting_worker.py`` found."""
    out = tmp_path / "result.json"
    options |= {"speculative_config": drafter, "tokens": TOKENS}
    process = subprocess.run(
        [
            sys.executable,
            *("-m", "tests.support.drafting_worker"),
            *(str(out), str(model), json.dumps(options)),
        ],
        env=environment() | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert out.exists(), process.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def assert_all_accepted(result: dict[str, Any], expected: list[list[int]]) -> None:
    assert result["tokens"] == expected
    assert result["accepted"] == result["drafted"] > 0


def layers_of_drafter(result: dict[str, Any]) -> set[str]:
    (drafter,) = result["plan"]["drafters"]
    return {layer["name"] for layer in drafter["layers"]}


def ticks(prompts: list[list[int]]) -> list[list[int]]:
    """How the clock continues."""
    last = torch.tensor([prompt[-1] for prompt in prompts])
    return torch.stack([after(last, step + 1) for step in range(TOKENS)], 1).tolist()


def test_eagle3_with_a_quantized_head_of_half_the_vocabulary(tmp_path: Path) -> None:
    odd_hours = torch.arange(VOCABULARY).view(-1, 2, 8)[:, 1].flatten()
    prompts = [[3, 200, 8 * (2 * hour + 1) + 5] for hour in range(4)]
    write_clock(tmp_path / "target", TableModel("llama", tied=False, table=Bits(8), head=Bits(8)))
    write_eagle3(tmp_path / "drafter", Eagle3(tokens=odd_hours))
    drafter = {
        "method": "eagle3",
        "model": str(tmp_path / "drafter"),
        "num_speculative_tokens": 1,
    }
    result = draft(tmp_path / "target", tmp_path, drafter, prompts=prompts)
    assert_all_accepted(result, ticks(prompts))
    assert "lm_head" in layers_of_drafter(result)


@pytest.mark.slow
def test_multi_token_prediction_from_the_target_s_file(tmp_path: Path) -> None:
    prompts = [[3, 200, 8 * hour + 5] for hour in range(4)]
    case = TableModel("qwen2-qkv-bias", tied=False, table=Bits(8), head=Bits(8))
    write_clock_with_mtp(tmp_path / "target", case)
    drafter = {"method": "mtp", "num_speculative_tokens": 1}
    result = draft(tmp_path / "target", tmp_path, drafter, prompts=prompts)
    assert_all_accepted(result, ticks(prompts))
    assert "model.layers.2.self_attn.qkv_proj" in layers_of_drafter(result)


@pytest.mark.slow
def test_a_draft_model_equal_to_its_target(tmp_path: Path) -> None:
    path = checkpoint("gptqmodel-gptq-w4-g64-sym-lmhead")
    prompts = checkpoint_reference(path.name)["input_ids"][:, :8]
    drafter = {"method": "draft_model", "model": str(path), "num_speculative_tokens": 3}
    result = draft(path, tmp_path, drafter, prompts=prompts.tolist())
    tokens = prompts
    with loaded(path) as model:
        for _ in range(TOKENS):
            newest = logits(model, tokens)[:, -1].argmax(-1)
            tokens = torch.cat([tokens, newest[:, None]], 1)
    assert_all_accepted(result, tokens[:, prompts.shape[1] :].tolist())
    assert "draft_model.lm_head" in layers_of_drafter(result)
