# SPDX-License-Identifier: Apache-2.0
"""Quantized experts, which are vLLM's: a complete checkpoint loads where vLLM has a class for them,
a gap in it is an error, and elsewhere the error names the layer and vLLM's own reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

from tests.support.architectures import VOCABULARY, Checkpoint
from tests.support.edited import edited
from tests.support.explained import explained
from tests.support.messages import saying
from tests.support.model_loading import loaded, logits
from tests.support.quantized_experts import AUTO_ROUND, EXPERTS, FORMS, checkpoint_in, store_zeros
from vllm.compressed_linear.checkpoint.completeness import IncompleteCheckpointError
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.integration import completeness
from vllm.compressed_linear.integration.delegation import RefusedByVllmError
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.prepare.plan import DELEGATED

pytestmark = pytest.mark.usefixtures("inspect_in_process")

needs_vllms_class = pytest.mark.skipif(
    not CPUExpertsInt4._supports_current_device(),
    reason="vLLM's class for quantized experts cannot run on this processor",
)


def difference(checkpoint: Checkpoint) -> float:
    """Mean difference of log-probabilities from those of the dequantized twin. vLLM's experts round
    x to 8 bits."""
    found = []
    for path in (checkpoint.ideal, checkpoint.quantized):
        with loaded(path, "bfloat16", skip_tokenizer_init=True) as model:
            found.append(logits(model, checkpoint.input_ids)[..., :VOCABULARY].log_softmax(-1))
    return float((found[0] - found[1]).abs().mean())


@pytest.mark.parametrize("form", FORMS)
def test_where_vllm_cannot_run_them_it_says_why(
    form: str, tmp_path: Path, no_int4_experts: None
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("vLLM runs quantized experts on accelerators")
    path = checkpoint_in(form, tmp_path).quantized
    # vLLM's class for AutoRound cannot load experts; for the formats that it uses it has one.
    used = {"auto-round": r".*auto_gptq.*WNA16", "auto-round-awq": r".*auto_awq.*WNA16"}
    why = used.get(form, r"RoutedExperts.*WNA16")
    with (
        pytest.raises(RefusedByVllmError, match=rf"layers\.0\.\S+experts: {why}"),
        loaded(path, skip_tokenizer_init=True),
    ):
        pass


LOADED = ["gptq", "awq", *AUTO_ROUND]
"""vLLM has no class for a CPU and compressed-tensors with groups."""


@needs_vllms_class
@pytest.mark.parametrize(
    ("stored", "version"),
    [(7, "gptq"), (8, "gptq"), (0, "gptq"), (8, "gptq_v2"), (7, "gptq_v2")],
)
def test_zero_points_of_symmetric_experts_are_the_middle_code_however_stored(
    stored: int, version: str, tmp_path: Path
) -> None:
    """vLLM's class adds 1 to them, whatever the version is."""
    checkpoint = checkpoint_in("gptq", tmp_path)
    store_zeros(checkpoint.quantized, stored, version)
    assert difference(checkpoint) <= 0.02


@needs_vllms_class
def test_zero_points_that_contradict_the_configuration_are_an_error(tmp_path: Path) -> None:
    checkpoint = checkpoint_in("gptq", tmp_path)
    file = checkpoint.quantized / "model.safetensors"
    tensors = load_file(file)
    name = f"{EXPERTS}.2.w2.qzeros"
    tensors[name] = torch.full_like(tensors[name], 0x33333333)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=saying(name, "stored as 3", "expected 8")):
        difference(checkpoint)


@needs_vllms_class
@pytest.mark.parametrize("form", LOADED)
def test_a_complete_checkpoint_loads_and_a_gap_is_an_error(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(
        completeness.logger, "warning", lambda text, *args: warnings.append(text % args)
    )
    checkpoint = checkpoint_in(form, tmp_path)
    assert not explained(checkpoint.quantized).errors
    assert difference(checkpoint) <= 0.02
    assert warnings == []
    delegated = [e.name for e in PROCESS_PLAN.entries.values() if e.backend == DELEGATED]
    assert len(delegated) == 2
    assert all("experts" in layer for layer in delegated)
    tensor = f"{EXPERTS}.2.w2.scales"
    path = edited(checkpoint.quantized, tmp_path / "edited", drop=[tensor])
    assert any(tensor in error for error in explained(path).errors)
    with (
        pytest.raises(IncompleteCheckpointError, match=saying(path, f"expected {tensor}")),
        loaded(path, "bfloat16", skip_tokenizer_init=True),
    ):
        pass
