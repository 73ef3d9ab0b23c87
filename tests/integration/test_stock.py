# SPDX-License-Identifier: Apache-2.0
"""Where vLLM by itself loads a checkpoint, it picks the same greedy tokens."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.support.checkpoints import checkpoint, checkpoint_reference, checkpoints, is_weight_only
from tests.support.model_loading import loaded, logits
from tests.support.repository import environment
from tests.support.stock_vllm import W4A16, needs_vllms_4_bit_kernel
from vllm.compressed_linear import settings

MARGIN = 0.4
"""Log-probability by which the fp32 reference must prefer a token for bf16 runs to agree on it:
stock rounds every dequantized weight to bf16, so both sides may be 0.2 away."""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor | str]:
    out = tmp_path_factory.mktemp("stock") / "logits.pt"
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.stock_worker",
            str(out),
            "bfloat16",
            *(str(checkpoint(name)) for name in checkpoints(is_weight_only)),
        ],
        env=environment(**{settings.ENABLE: "0"}, **W4A16),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return torch.load(out)


def test_stock_vllm_loads_some_of_them(stock: dict[str, torch.Tensor | str]) -> None:
    needs_vllms_4_bit_kernel()
    assert sum(isinstance(found, torch.Tensor) for found in stock.values()) >= 5


@pytest.mark.parametrize("name", checkpoints(is_weight_only))
def test_greedy_tokens_equal_stock_vllms(name: str, stock: dict[str, torch.Tensor | str]) -> None:
    theirs = stock[name]
    if isinstance(theirs, str):
        pytest.skip(f"stock vLLM cannot load it: {theirs[:200]}")
    reference = checkpoint_reference(name)
    with loaded(checkpoint(name), "bfloat16") as model:
        ours = logits(model, reference["input_ids"])
    best = torch.log_softmax(reference["logits"], -1).topk(2, -1).values
    clear = best[..., 0] - best[..., 1] > MARGIN
    assert int(clear.sum()) >= 20
    assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
