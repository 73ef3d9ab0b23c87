# SPDX-License-Identifier: Apache-2.0
"""What ``explain`` says of damaged checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import checkpoint
from tests.support.explained import explained
from tests.support.messages import saying
from vllm.compressed_linear.commands.explain.checkpoint import ExplainError
from vllm.compressed_linear.commands.explain.explain import explain
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration.preparation import detect_platform


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(checkpoint("gptqmodel-gptq-w4-g128-sym"), copy)
    return copy


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        config["quantization_config"].pop(key, None)
        if value is not None:
            config["quantization_config"][key] = value
    (path / "config.json").write_text(json.dumps(config))


def test_a_config_without_bits(damaged: Path) -> None:
    change_config(damaged, bits=None)
    with pytest.raises(ConfigError, match=saying("bits")):
        explained(damaged)


def test_a_config_that_contradicts_the_tensors(damaged: Path) -> None:
    change_config(damaged, group_size=32)
    errors = explained(damaged).errors
    assert len(errors) == 8  # of every layer, not only of the first
    assert re.search(saying(re.compile(r"q_proj\.(qzeros|scales)"), "shape"), errors[0])


def test_a_truncated_file(damaged: Path) -> None:
    file = next(damaged.glob("*.safetensors"))
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size - 1000)
    with pytest.raises(ExplainError, match=saying("truncated")):
        explained(damaged)


def test_a_missing_tensor(damaged: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = next(damaged.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.scales"]
    save_file(tensors, file)
    missing = saying("model.layers.1.mlp.down_proj.scales", "checkpoint")
    assert re.search(missing, "\n".join(explained(damaged).errors))


def test_values_are_checked_when_they_are_read(damaged: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = next(damaged.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.scales"][0, 5] = float("nan")
    save_file(tensors, file)
    assert not explained(damaged).errors
    (error,) = explained(damaged, read_weights=True).errors
    assert re.search(saying("1.mlp.down_proj.scales", "finite"), error)


def test_a_missing_file(damaged: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExplainError, match=saying("model-00002-of-00002.safetensors")):
        explained(damaged)


def test_a_model_that_is_nowhere() -> None:
    with pytest.raises(ExplainError, match=saying("/nowhere/at/all")):
        explained(Path("/nowhere/at/all"))
    with pytest.raises(ExplainError, match=saying("nobody/no-such-model", "cache")):
        explain("nobody/no-such-model", platform=detect_platform())
