# SPDX-License-Identifier: Apache-2.0
"""vLLM's own weight reload: the same model object, other weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.messages import saying
from tests.support.model_loading import loaded, logits
from tests.support.reloading import addresses, reload, worst_error
from tests.support.synthetic import Model, Quant, write
from vllm.compressed_linear.integration.reload import ReloadRefusedError

MODELS = {
    "gptq": Model(Quant("gptq", symmetric=False)),
    "act-order": Model(Quant("gptq", symmetric=False, act_order=True)),
    "mixed-shards": Model(
        Quant("ct"),
        overrides={"q_proj": Quant("ct", bits=8), "k_proj": None, "up_proj": Quant("ct", bits=3)},
    ),
    "fused-on-disk": Model(Quant("awq", symmetric=False), "Phi3ForCausalLM"),
    "with-bias": Model(Quant("gptq"), bias=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_reloaded_weights_give_the_new_models_logits(name: str, tmp_path: Path) -> None:
    first = write(MODELS[name], tmp_path / "first")
    second = write(replace(MODELS[name], seed=1), tmp_path / "second")
    with loaded(tmp_path / "first", skip_tokenizer_init=True) as model:
        before = addresses(model)
        assert worst_error(logits(model, first["input_ids"]), first) <= 1e-4
        for reference, path in ((second, "second"), (first, "first")):
            reload(model, tmp_path / path)
            assert worst_error(logits(model, reference["input_ids"]), reference) <= 1e-4
        after = addresses(model)
    assert after == before, "a reload must write into the tensors that compiled graphs hold"


@pytest.mark.parametrize("name", [name for name in MODELS if name != "act-order"])
def test_weights_can_follow_after_a_start_with_dummy_weights(name: str, tmp_path: Path) -> None:
    """Headers tell what values do not: dummy weights are planned as the real ones."""
    reference = write(MODELS[name], tmp_path)
    with loaded(tmp_path, skip_tokenizer_init=True, load_format="dummy") as model:
        model.config.load_config.load_format = "safetensors"
        before = addresses(model)
        reload(model, tmp_path)
        assert worst_error(logits(model, reference["input_ids"]), reference) <= 1e-4
        assert addresses(model) == before


def test_an_order_of_channels_cannot_follow_dummy_weights(tmp_path: Path) -> None:
    write(MODELS["act-order"], tmp_path)
    with loaded(tmp_path, skip_tokenizer_init=True, load_format="dummy") as model:
        model.config.load_config.load_format = "safetensors"
        expected = saying("old weights", "reordered K", "restart", "--load-format auto")
        with pytest.raises(ReloadRefusedError, match=expected):
            reload(model, tmp_path)
