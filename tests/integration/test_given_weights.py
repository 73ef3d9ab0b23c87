# SPDX-License-Identifier: Apache-2.0
"""What a model's loader is given, first from the files and then by whoever reloads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.messages import saying
from tests.support.quantized_experts import EXPERTS, checkpoint_in, store_zeros
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats.registry import parse
from vllm.compressed_linear.integration.config import CompressedLinearConfig
from vllm.compressed_linear.integration.given_weights import GivenWeights, given_to
from vllm.compressed_linear.integration.zeros_of_experts import ZerosOfExperts

ZEROS = f"{EXPERTS}.2.w2.qzeros"
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


class Recorder(torch.nn.Module):
    """A model that keeps what it is given."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self.given = dict(weights)
        return set(self.given)


def given_by(config: CompressedLinearConfig) -> GivenWeights:
    return GivenWeights(
        config.superseded,
        config.format.restated,
        ZerosOfExperts(config.format, config.file),
        {},
    )


def test_zero_points_of_experts_are_converted_in_every_load(tmp_path: Path) -> None:
    """vLLM's class reads those of the first version, and these are of the second."""
    path = checkpoint_in("gptq", tmp_path).quantized
    store_zeros(path, 8, "gptq_v2")
    config = CompressedLinearConfig(parse(CONFIG | {"checkpoint_format": "gptq_v2"}))
    config.maybe_update_config(str(path))
    model = Recorder()
    given = given_by(config)
    given.install(model)
    assert given_to(model) is given
    tensors = load_file(path / "model.safetensors")
    for source in ("", str(path), None):
        given.read_from(source)
        assert ZEROS in model.load_weights(tensors.items())
        assert model.given[ZEROS].unique().tolist() == [0x77777777]
        assert model.given.keys() == tensors.keys()


def test_modules_that_the_model_calls_otherwise_keep_that_name_in_every_load() -> None:
    config = CompressedLinearConfig(parse(CONFIG))
    model = Recorder()
    given = GivenWeights(
        config.superseded,
        config.format.restated,
        ZerosOfExperts(config.format, config.file),
        {"a": "b"},
    )
    given.install(model)
    for source in ("", None):
        given.read_from(source)
        model.load_weights([("a.codes", torch.ones(1)), ("a.c.codes", torch.ones(1))])
        assert set(model.given) == {"b.codes", "a.c.codes"}


def test_zero_points_that_contradict_the_configuration_are_an_error(tmp_path: Path) -> None:
    path = checkpoint_in("gptq", tmp_path).quantized
    store_zeros(path, 3, "gptq_v2")
    config = CompressedLinearConfig(parse(CONFIG | {"checkpoint_format": "gptq_v2"}))
    config.maybe_update_config(str(path))
    model = Recorder()
    given_by(config).install(model)
    with pytest.raises(CheckpointError, match=saying("qzeros", "stored as 3", "expected 8")):
        model.load_weights(load_file(path / "model.safetensors").items())
