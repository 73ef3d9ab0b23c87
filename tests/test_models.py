# SPDX-License-Identifier: Apache-2.0
"""Every checkpoint of our formats, loaded into vLLM's model, against the fp32 logits its maker's
library gives."""

from __future__ import annotations


import pytest
import torch
from conftest import checkpoint, checkpoint_reference, checkpoints
from model_loading import loaded, logits

from vllm.compressed_linear import settings
from vllm.compressed_linear.plan import DELEGATED, PLAN

WEIGHT_ONLY = [
    name
    for name in checkpoints("gptqmodel-gptq", "autoawq-", "autoround-", "llmcompressor-w")
    if "a8" not in name and "mxfp4" not in name
]
MIXED = checkpoints("llmcompressor-mixed")
"""Some of their layers are delegated to vLLM: fp8 ones quantise activations as it does."""


def log_probabilities(name: str, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and the reference's, fp32 [batch, tokens, vocabulary]."""
    reference = checkpoint_reference(name)
    with loaded(checkpoint(name), dtype) as model:
        ours = logits(model, reference["input_ids"])
    return torch.log_softmax(ours, -1), torch.log_softmax(reference["logits"], -1)


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv(settings.BACKEND, f"unquantized={backend},{backend}")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_fp32_logits_match_the_makers_library(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, backend)
    ours, reference = log_probabilities(name, "float32")
    assert float((ours - reference).abs().max()) <= 1e-4
    assert {entry.backend for entry in PLAN.entries.values()} == {backend}


@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_bf16_logits_are_near_the_fp32_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, "cpu")
    ours, reference = log_probabilities(name, "bfloat16")
    error = (ours - reference).abs()
    assert float(error.max()) <= 0.15
    assert float(error.mean()) <= 0.03


@pytest.mark.parametrize("name", MIXED)
def test_layers_we_lack_are_delegated_and_the_plan_says_so(name: str) -> None:
    ours, _ = log_probabilities(name, "bfloat16")
    assert bool(torch.isfinite(ours).all())
    backends = {entry.name: entry.backend for entry in PLAN.entries.values()}
    assert DELEGATED in backends.values()
    assert "cpu" in backends.values()
