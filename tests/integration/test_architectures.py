# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints of many model families: the numbers of their dequantized twins."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.architectures import (
    BLOOM,
    FAMILIES,
    LLAMA4,
    POOLING,
    SEEING,
    VOCABULARY,
    WITHOUT_LOGITS,
    Checkpoint,
    Family,
    layer_outputs,
    write,
)
from tests.support.messages import saying
from tests.support.model_loading import loaded, logits
from tests.support.stock_vllm import fp32_options
from tests.support.synthetic import Quant
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration.config import NAME
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

pytestmark = pytest.mark.usefixtures("inspect_in_process")

QUANTS = {
    "gptq": Quant("gptq"),
    "gptq-3bit-asymmetric": Quant("gptq", bits=3, symmetric=False),
    "awq": Quant("awq", symmetric=False),
    "compressed-tensors": Quant("ct"),
    "compressed-tensors-asymmetric": Quant("ct", bits=8, symmetric=False),
}
FUSED_ON_DISK = ("phi3-fused-on-disk", "falcon-kv-groups", "gpt-neox-fused-by-heads")
"""Families that also try every kind of layout: their tensors are cut or reordered as they load."""
UNQUANTIZED_TOO = ("opt", "gpt2-input-major", "gemma-tied", "falcon-kv-groups", "mixtral")
ALL = FAMILIES | WITHOUT_LOGITS | SEEING


def forms(name: str) -> list[str]:
    return list(QUANTS) if name in FUSED_ON_DISK else ["gptq", "awq", "compressed-tensors"]


def cases(families: dict[str, Family]) -> list[Any]:
    return [
        pytest.param(name, form, id=f"{name}-{form}") for name in families for form in forms(name)
    ]


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Checkpoint]:
    """All of a family's checkpoints are written before the first is loaded: where vLLM has no model
    of its own it wraps the class of the transformers library, for good."""
    written: dict[str, dict[str, Checkpoint]] = {}

    def get(name: str, form: str) -> Checkpoint:
        if name not in written:
            family = ALL[name]
            written[name] = {
                form: write(
                    family,
                    QUANTS[form],
                    tmp_path_factory.mktemp(name),
                    reference=name not in WITHOUT_LOGITS,
                )
                for form in forms(name)
            }
        return written[name][form]

    return get


def assert_same_logits(checkpoint: Checkpoint, **options: Any) -> None:
    with loaded(checkpoint.quantized, skip_tokenizer_init=True, **options) as model:
        ours = logits(model, checkpoint.input_ids)[..., :VOCABULARY]
    assert checkpoint.logits is not None
    error = torch.log_softmax(ours, -1) - torch.log_softmax(checkpoint.logits, -1)
    assert float(error.abs().max()) <= 1e-4


def assert_same_layers(checkpoint: Checkpoint, **options: Any) -> None:
    """Every linear of vLLM's model does what stock vLLM's does with the dequantized weights."""
    ours = layer_outputs(checkpoint.quantized, **options)
    assert PROCESS_PLAN.prepared == PROCESS_PLAN.expected > 0
    stock = layer_outputs(checkpoint.ideal, **options)
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(("name", "form"), cases(FAMILIES))
def test_logits_equal_those_of_transformers(
    name: str, form: str, checkpoint_of: Callable[[str, str], Checkpoint]
) -> None:
    checkpoint = checkpoint_of(name, form)
    assert_same_logits(checkpoint)
    assert {entry.backend for entry in PROCESS_PLAN.entries.values()} == {"cpu"}
    quantized = [e for e in PROCESS_PLAN.entries.values() if "uint" in e.descriptor]
    assert len(quantized) >= len(checkpoint.modules) // 4
    assert PROCESS_PLAN.prepared == PROCESS_PLAN.expected


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(("name", "form"), cases(WITHOUT_LOGITS))
def test_layers_equal_those_of_vllm(
    name: str, form: str, checkpoint_of: Callable[[str, str], Checkpoint]
) -> None:
    assert_same_layers(checkpoint_of(name, form), **fp32_options(name))


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", [*WITHOUT_LOGITS, *UNQUANTIZED_TOO])
def test_unquantized_models_that_opt_in(
    name: str, checkpoint_of: Callable[[str, str], Checkpoint]
) -> None:
    ideal = checkpoint_of(name, "gptq").ideal
    ours = layer_outputs(ideal, quantization=NAME, **fp32_options(name))
    assert PROCESS_PLAN.prepared == PROCESS_PLAN.expected > 0
    stock = layer_outputs(ideal, **fp32_options(name))
    assert ours.keys() == stock.keys()
    for layer, expected in stock.items():
        torch.testing.assert_close(ours[layer], expected, rtol=1e-4, atol=1e-4, msg=layer)


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("name", POOLING)
def test_models_that_embed(name: str, form: str, tmp_path: Path) -> None:
    checkpoint = write(POOLING[name], QUANTS[form], tmp_path, reference=False)
    assert_same_layers(checkpoint, runner="pooling")


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_bloom_is_refused_where_vllm_would_shuffle_channels(form: str, tmp_path: Path) -> None:
    checkpoint = write(BLOOM, QUANTS[form], tmp_path, reference=False)
    with (
        pytest.raises(ConfigError, match=saying("query_key_value", "qweight")),
        loaded(checkpoint.quantized, skip_tokenizer_init=True),
    ):
        pass


def test_llama4_is_right_or_refused(tmp_path: Path) -> None:
    """vLLM's model reorders q and k by the names of tensors, which leaves out GPTQ, AWQ and zero
    points; stock vLLM computes garbage there."""
    assert_same_logits(write(LLAMA4, Quant("ct"), tmp_path / "symmetric"))
    for form, tensors in (
        ("gptq", "qweight, qzeros, scales"),
        ("awq", "qweight, qzeros, scales"),
        ("compressed-tensors-asymmetric", "weight_zero_point"),
    ):
        checkpoint = write(LLAMA4, QUANTS[form], tmp_path / form, reference=False)
        with (
            pytest.raises(ConfigError, match=saying(re.compile(r"\bq_proj\b"), tensors)),
            loaded(checkpoint.quantized, skip_tokenizer_init=True),
        ):
            pass


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(("name", "form"), cases(SEEING))
def test_models_that_see(
    name: str, form: str, checkpoint_of: Callable[[str, str], Checkpoint]
) -> None:
    checkpoint = checkpoint_of(name, form)
    assert_same_layers(checkpoint)
    assert_same_logits(checkpoint)


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", SEEING)
def test_models_that_see_without_headers(
    name: str, checkpoint_of: Callable[[str, str], Checkpoint], tmp_path: Path
) -> None:
    """Pickled, so that the configuration alone says what is quantized: in names of the checkpoint,
    such as ``lm_head``, which are not vLLM's."""
    checkpoint = checkpoint_of(name, "compressed-tensors")
    tensors = load_file(checkpoint.quantized / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    shutil.copy(checkpoint.quantized / "config.json", tmp_path)
    assert_same_logits(replace(checkpoint, quantized=tmp_path), load_format="auto")
