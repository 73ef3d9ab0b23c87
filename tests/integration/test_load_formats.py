# SPDX-License-Identifier: Apache-2.0
"""Ways to save and to load that are not a plain checkpoint: right, or one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.architectures import FAMILIES, Checkpoint, write
from tests.support.messages import saying
from tests.support.model_loading import loaded, logits
from tests.support.synthetic import Quant
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.integration.config import NAME
from vllm.compressed_linear.integration.whole_model import UnsavableError

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("load-formats")
    return write(FAMILIES["qwen2-qkv-bias"], Quant("gptq"), path)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("form", ["sharded-state", "tensorizer"])
def test_a_running_model_is_not_saved_in_a_form_that_nobody_loads(
    form: str, quantized: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
    from vllm.model_executor.model_loader.tensorizer_loader import TensorizerLoader

    path = checkpoint.quantized if quantized else checkpoint.ideal
    options: dict[str, Any] = {} if quantized else {"quantization": NAME}
    expected = saying(form.replace("-", " "), "original checkpoint")
    with loaded(path, **options) as model:
        save = {
            "sharded-state": lambda: ShardedStateLoader.save_model(model.model, str(tmp_path)),
            "tensorizer": lambda: TensorizerLoader.save_model(
                model.model, {}, model.config.model_config
            ),
        }[form]
        with pytest.raises(UnsavableError, match=expected):
            save()
    assert not list(tmp_path.iterdir())


def test_a_model_without_our_layers_is_saved_as_ever(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    with loaded(checkpoint.quantized):
        pass  # the guard is in this process now
    with loaded(checkpoint.ideal) as model:
        ShardedStateLoader.save_model(model.model, str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["model-rank-0-part-0.safetensors"]


@pytest.mark.parametrize("form", ["sharded_state", "runai_streamer_sharded"])
def test_a_loader_that_restores_kernel_tensors_is_refused_before_loading(
    form: str, checkpoint: Checkpoint
) -> None:
    with (
        pytest.raises(ConfigError, match=saying("qkv_proj", form, "original checkpoint")),
        loaded(checkpoint.quantized, load_format=form),
    ):
        pass


@pytest.mark.parametrize("quantized", [True, False])
def test_a_loader_that_processes_no_weights_is_refused_before_loading(
    quantized: bool, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package that ``tensorizer`` needs is not there; only its name counts."""
    monkeypatch.setattr(compat, "load_format", lambda: "tensorizer")
    path = checkpoint.quantized if quantized else checkpoint.ideal
    with (
        pytest.raises(ConfigError, match=saying("embed_tokens", "tensorizer", "safetensors")),
        loaded(path, quantization=NAME),
    ):
        pass


def test_the_natural_weights_of_a_sharded_state_are_loaded(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """As a GPU saves an unquantized model; stock vLLM on a CPU saves one without its weights."""
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    with loaded(checkpoint.ideal) as model:
        expected = logits(model, checkpoint.input_ids)
        ShardedStateLoader.save_model(model.model, str(tmp_path))
    file = tmp_path / "model-rank-0-part-0.safetensors"
    state, source = load_file(file), load_file(checkpoint.ideal / "model.safetensors")
    members = {member: fused for fused, parts in FUSED.items() for member in parts}
    for name, tensor in source.items():
        if "_proj.weight" not in name:
            continue
        last = name.split(".")[-2]
        if (fused := members.get(last)) is None:
            state[name] = tensor
        elif FUSED[fused][0] == last:
            parts = [source[name.replace(last, part)] for part in FUSED[fused]]
            state[name.replace(last, fused)] = torch.cat(parts)
    save_file(state, file)
    shutil.copy(checkpoint.ideal / "config.json", tmp_path)
    with loaded(tmp_path, load_format="sharded_state", quantization=NAME) as model:
        ours = logits(model, checkpoint.input_ids)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
