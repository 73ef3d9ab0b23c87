# SPDX-License-Identifier: Apache-2.0
"""Files whose tensors and flags disagree, loaded: the numbers of the unchanged file, and a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.changed_checkpoints import Tensors, changed_copy
from tests.support.checkpoints import checkpoint_reference
from tests.support.explained import explained
from tests.support.messages import says
from tests.support.model_loading import loaded, logits
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

GPTQ = "gptqmodel-gptq-w4-g128-sym"
AWQ = "autoawq-awq-gemm-g128-asym"
PACKED = "llmcompressor-w4a16-asym-g32"
Q, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
DOWN = "model.layers.1.mlp.down_proj"


def disagree(tensors: Tensors) -> None:
    """One weight of each kind; no group index has an order."""
    tensors[f"{Q}.qzeros"] = (tensors[f"{Q}.qzeros"].to(torch.int64) + 0x11111111).to(torch.int32)
    tensors[f"{V}.qzeros"].zero_()
    tensors.pop(f"{DOWN}.qzeros")
    for name, tensor in tensors.items():
        if name.endswith(".g_idx"):
            tensor.zero_()


def test_zero_points_and_group_indices_that_say_nothing(tmp_path: Path) -> None:
    path = changed_copy(GPTQ, tmp_path, disagree)
    reference = checkpoint_reference(GPTQ)
    with loaded(path) as model:
        ours = torch.log_softmax(logits(model, reference["input_ids"]), -1)
    expected = torch.log_softmax(reference["logits"], -1)
    assert float((ours - expected).abs().max()) <= 1e-4
    note = PROCESS_PLAN.entries["model.layers.0.self_attn.qkv_proj", 0].note
    assert says(note, "q_proj", "sym: true", 8, 7)
    assert says(note, "v_proj", "sym: true", 0, 7)
    assert PROCESS_PLAN.entries[DOWN, 0].note == ""

    read = {layer.name: layer for layer in explained(path, read_weights=True).layers}
    (part,) = read["model.layers.0.self_attn.qkv_proj"].likely.parts
    assert "; ".join(part.notes) in note
    assert part.descriptor.weight.zero is None
    assert read[DOWN].likely.parts[0].notes == ()


def empty(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith((".qzeros", ".g_idx")):
            tensors[name] = torch.empty(0, dtype=torch.int32)


def test_empty_tensors_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")  # no note that vLLM alone would round x
    path = changed_copy(GPTQ, tmp_path, empty)
    reference = checkpoint_reference(GPTQ)
    with loaded(path) as model:
        ours = torch.log_softmax(logits(model, reference["input_ids"]), -1)
    assert float((ours - torch.log_softmax(reference["logits"], -1)).abs().max()) <= 1e-4
    plan = explained(path)
    assert (plan.errors, plan.notes) == ([], [])


WORDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "a kernel for GPTQ": (GPTQ, {"checkpoint_format": "exllama"}, False),
    "numbers as text": (GPTQ, {"bits": "4", "group_size": "128.0", "sym": "true"}, False),
    "a kernel for AWQ": (AWQ, {"version": "exllama", "modules_to_not_convert": "lm_head"}, False),
    "a class instead of a list": (PACKED, {"ignore": "lm_head"}, False),
    "pickled": (PACKED, {}, True),
    "pickled GPTQ": (GPTQ, {}, True),
}


@pytest.mark.parametrize(
    ("name", "words", "pickled"), [pytest.param(*case, id=what) for what, case in WORDS.items()]
)
def test_words_that_change_no_number(
    name: str, words: dict[str, Any], pickled: bool, tmp_path: Path
) -> None:
    def write(config: dict[str, Any]) -> None:
        config |= words
        for group in config.get("config_groups", {}).values():
            group["targets"] = "Linear"
            group["weights"] |= {"num_bits": "4", "group_size": 32.0}

    path = changed_copy(name, tmp_path, quantization=write, pickled=pickled)
    reference = checkpoint_reference(name)
    with loaded(path, load_format="auto") as model:
        ours = torch.log_softmax(logits(model, reference["input_ids"]), -1)
    assert float((ours - torch.log_softmax(reference["logits"], -1)).abs().max()) <= 1e-4
