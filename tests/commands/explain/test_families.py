# SPDX-License-Identifier: Apache-2.0
"""``explain`` for many model families: names, shards and the split are those of the real model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.architectures import FAMILIES, SEEING, WITHOUT_LOGITS, write
from tests.support.explained import explained, loaded_parts, planned_parts
from tests.support.messages import says
from tests.support.model_loading import loaded
from tests.support.stock_vllm import fp32_options
from tests.support.synthetic import Quant

FILE = "model.safetensors"
ALL = FAMILIES | WITHOUT_LOGITS | SEEING


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("family", ALL)
def test_the_loaded_model_is_one_that_was_named(family: str, tmp_path: Path) -> None:
    path = write(ALL[family], Quant("gptq"), tmp_path, reference=False).quantized
    named = explained(path, dtype="float32")
    read = explained(path, dtype="float32", read_weights=True)
    options: dict[str, Any] = {"skip_tokenizer_init": True} | fp32_options(family)
    with loaded(path, **options):
        actual = loaded_parts()
    assert not named.notes
    assert list(dict.fromkeys(layer.name for layer in named.layers)) == list(actual)
    for layer in named.layers:
        assert actual[layer.name] in [planned_parts(layer, case) for case in layer.cases]
    for layer in read.layers:
        assert [actual[layer.name]] == [planned_parts(layer, case) for case in layer.cases]


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("form", ["gptq", "ct"])
def test_values_that_are_keys_are_explained_as_they_are_loaded(form: str, tmp_path: Path) -> None:
    """Full attention of Gemma 4 with ``attention_k_eq_v``: the files have no v_proj."""
    gemma = FAMILIES["gemma4"]
    family = replace(gemma, config=gemma.config | {"attention_k_eq_v": True})
    path = write(family, Quant(form), tmp_path, reference=False).quantized
    assert not any("layers.1.self_attn.v_proj" in name for name in load_file(path / FILE))
    named = explained(path, dtype="float32")
    read = explained(path, dtype="float32", read_weights=True)
    with loaded(path, skip_tokenizer_init=True):
        actual = loaded_parts()
    assert not named.errors
    assert [layer.name for layer in named.layers] == list(actual)
    for layer in read.layers:
        assert [actual[layer.name]] == [planned_parts(layer, case) for case in layer.cases]


@pytest.mark.parametrize("family", ["mamba2", "nemotron-h-hybrid"])
@pytest.mark.parametrize("form", ["gptq", "awq", "ct"])
def test_rows_that_each_rank_would_have_to_repeat_are_named(
    family: str, form: str, tmp_path: Path
) -> None:
    """A state space with one group, of which vLLM's mixer gives every rank a copy."""
    quant = Quant(form, symmetric=form != "awq")
    path = write(WITHOUT_LOGITS[family], quant, tmp_path, reference=False).quantized
    assert not explained(path).errors
    (first, *_) = explained(path, tp_size=2).errors
    assert says(first, "in_proj", 584, "2 ranks", 552, "--tensor-parallel-size 1")
