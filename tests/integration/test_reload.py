# SPDX-License-Identifier: Apache-2.0
"""vLLM's own weight reload: the same model object, other weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.messages import saying
from tests.support.model_loading import loaded, logits
from tests.support.reloading import addresses, reload, worst_error
from tests.support.synthetic import Model, Quant, write
from vllm.compressed_linear.checkpoint.headers import INDEX
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


def test_a_reload_leaves_out_what_loading_leaves_out(tmp_path: Path) -> None:
    """Copies that the index does not mean, and plain weights next to codes."""
    write(Model(Quant("gptq")), tmp_path / "first")
    second = write(Model(Quant("gptq"), seed=1), tmp_path / "second")
    file = tmp_path / "second" / "model.safetensors"
    tensors = load_file(file)
    plain = {"model.layers.0.self_attn.q_proj.weight": torch.ones(128, 128)}
    copies = {name: t.flip(0).contiguous() for name, t in tensors.items() if ".mlp." in name}
    save_file(copies, tmp_path / "second" / "z.safetensors", {"format": "pt"})
    save_file(tensors | plain, file, {"format": "pt"})
    index = dict.fromkeys(tensors | plain, file.name)
    (tmp_path / "second" / INDEX).write_text(json.dumps({"weight_map": index}))
    with loaded(tmp_path / "first", skip_tokenizer_init=True) as model:
        reload(model, tmp_path / "second")
        assert worst_error(logits(model, second["input_ids"]), second) <= 1e-4


def test_a_trainer_s_plain_weight_of_a_quantized_module_is_refused(tmp_path: Path) -> None:
    """Only next to codes in a file a plain weight is known not to count."""
    first = write(Model(Quant("gptq")), tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    sent = [*load_file(tmp_path / "model.safetensors").items(), (name, torch.ones(128, 128))]
    with loaded(tmp_path, skip_tokenizer_init=True) as model:
        with pytest.raises(ReloadRefusedError, match="old weights"):
            reload(model, None, sent)
        assert worst_error(logits(model, first["input_ids"]), first) <= 1e-4
