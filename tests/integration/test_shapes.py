# SPDX-License-Identifier: Apache-2.0
"""Synthetic models against transformers' fp32 logits: shapes and mixtures the zoo does not have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.model_loading import loaded, logits
from tests.support.synthetic import Model, Quant, write
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

GPTQ = Quant("gptq")
MODELS = {
    "ragged-last-group": Model(Quant("gptq", group_size=96)),
    "ragged-last-group-act-order": Model(Quant("gptq", group_size=96, act_order=True)),
    "asymmetric-act-order": Model(Quant("gptq", symmetric=False, act_order=True)),
    "vocab-not-a-multiple-of-64": Model(GPTQ, vocab=501),
    "one-kv-head": Model(GPTQ, kv_heads=1),
    "with-bias": Model(GPTQ, bias=True),
    "awq": Model(Quant("awq", symmetric=False)),
    "channel-3-bit": Model(Quant("ct", bits=3, group_size=-1)),
    "fused-on-disk-gptq": Model(GPTQ, "Phi3ForCausalLM"),
    "fused-on-disk-gptq-3-bit-odd-head": Model(
        Quant("gptq", bits=3, symmetric=False), "Phi3ForCausalLM", hidden=96, heads=4, kv_heads=1
    ),
    "fused-on-disk-awq": Model(Quant("awq", symmetric=False), "Phi3ForCausalLM"),
    "fused-on-disk-ct-asymmetric": Model(Quant("ct", bits=5, symmetric=False), "Phi3ForCausalLM"),
    "qkv-of-different-bits": Model(
        Quant("ct"), overrides={"q_proj": Quant("ct", bits=8), "v_proj": Quant("ct", bits=3)}
    ),
    "gate-unquantized": Model(GPTQ, overrides={"gate_proj": None, "k_proj": None}),
    "group-sizes-differ": Model(GPTQ, overrides={"up_proj": Quant("gptq", group_size=64)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = write(MODELS[name], tmp_path / "model")
    with loaded(tmp_path / "model", skip_tokenizer_init=True) as model:
        ours = logits(model, reference["input_ids"])[..., : MODELS[name].vocab]
    error = torch.log_softmax(ours, -1) - torch.log_softmax(reference["logits"], -1)
    assert float(error.abs().max()) <= 1e-4
    assert {entry.backend for entry in PROCESS_PLAN.entries.values()} == {"cpu"}
