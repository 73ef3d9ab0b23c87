# SPDX-License-Identifier: Apache-2.0
"""Whisper: a table of torch's class with a tied head, and key projections without a bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.messages import saying
from tests.support.model_loading import loaded
from tests.support.reloading import reload, rewrite
from tests.support.synthetic import Quant
from tests.support.whisper import WhisperCase, logits, write
from vllm.compressed_linear.integration.config import NAME
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

OPTED_IN = {"quantization": NAME}
ONE_OF_A_LAYER = ("encoder.layers.1.self_attn.v_proj", "model.decoder.layers.0.encoder_attn.k_proj")
CASES: dict[str, tuple[WhisperCase, dict[str, Any]]] = {
    "opted-in": (WhisperCase(None), OPTED_IN),
    "gptq": (WhisperCase(Quant("gptq", symmetric=False)), {}),
    "awq": (WhisperCase(Quant("awq", symmetric=False)), {}),
    "compressed-tensors": (WhisperCase(Quant("ct")), {}),
    "gptq-without-keys": (WhisperCase(Quant("gptq"), ("k_proj", "fc2")), {}),
    "compressed-tensors-without-values": (WhisperCase(Quant("ct"), ("v_proj",)), {}),
    "gptq-by-full-name": (WhisperCase(Quant("gptq"), ONE_OF_A_LAYER), {}),
    "compressed-tensors-by-full-name": (WhisperCase(Quant("ct"), ONE_OF_A_LAYER), {}),
}
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 32}


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan() -> Iterator[None]:
    """Else a bias that nothing fills may be zero by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def worst(model: Any, reference: dict[str, torch.Tensor]) -> float:
    ours = torch.log_softmax(logits(model, reference), -1)
    return float((ours - torch.log_softmax(reference["logits"], -1)).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    case, options = CASES[name]
    reference = write(case, tmp_path)
    with loaded(tmp_path, **OPTIONS, **options) as model:
        assert worst(model, reference) <= 2e-5
    entries = {entry.name: entry for entry in PROCESS_PLAN.entries.values()}
    assert entries["proj_out"].note == "tied: the embedding table looks up in the natural weight"
    assert "decoder.layers.1.layers.encoder_attn.kv_proj" in entries


def test_a_bias_of_the_file_is_kept(tmp_path: Path) -> None:
    reference = write(WhisperCase(Quant("gptq")), tmp_path)
    name = "model.encoder.layers.0.self_attn.k_proj.bias"
    given = torch.full((64,), 3.0)
    rewrite(tmp_path, lambda tensors: tensors.update({name: given}))
    with loaded(tmp_path, **OPTIONS) as model:
        bias = model.model.model.encoder.layers[0].self_attn.qkv_proj.bias
        assert torch.equal(bias[64:128], given)
        assert torch.isfinite(logits(model, reference)).all()


def test_a_reload_renews_the_table_and_its_head(tmp_path: Path) -> None:
    case = WhisperCase(Quant("gptq"))
    first = write(case, tmp_path / "first")
    second = write(replace(case, seed=1), tmp_path / "second")
    write(replace(case, seed=1), tmp_path / "damaged")
    rewrite(tmp_path / "damaged", lambda tensors: _halve(tensors, "model.encoder.conv2.weight"))
    with loaded(tmp_path / "first", **OPTIONS) as model:
        before = logits(model, first)
        reload(model, tmp_path / "second")
        assert worst(model, second) <= 2e-5
        reload(model, tmp_path / "first")
        assert torch.equal(logits(model, first), before)
        with pytest.raises(ValueError, match=saying("old weights")):
            reload(model, tmp_path / "damaged")
        assert torch.equal(logits(model, first), before)


def _halve(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:1].contiguous()
