# SPDX-License-Identifier: Apache-2.0
"""Who runs what: names the user may pass, the off switch, and layers that are left to vLLM."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.architectures import FAMILIES, VOCABULARY, Checkpoint, Family, write
from tests.support.model_loading import engine_args, loaded, logits
from tests.support.repository import environment
from tests.support.synthetic import Quant
from vllm.compressed_linear import settings
from vllm.compressed_linear.formats.awq import Awq
from vllm.compressed_linear.formats.compressed_tensors import CompressedTensors
from vllm.compressed_linear.formats.gptq import Gptq
from vllm.compressed_linear.integration.config import NAME, CompressedLinearConfig
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.prepare.plan import DELEGATED

pytestmark = pytest.mark.usefixtures("inspect_in_process")

LLAMA = Family("llama", "LlamaForCausalLM")
QUANTS = {
    "gptq": Quant("gptq"),
    "awq": Quant("awq", symmetric=False),
    "compressed-tensors": Quant("ct"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    written = {
        form: write(LLAMA, quant, tmp_path_factory.mktemp(form)) for form, quant in QUANTS.items()
    }
    return written.__getitem__


def quant_config(path: Path, **options: Any) -> Any:
    args = engine_args(path, skip_tokenizer_init=True, **options)
    return args.create_engine_config().quant_config


def log_probabilities(path: Path, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with loaded(path, skip_tokenizer_init=True, **options) as model:
        return logits(model, input_ids)[..., :VOCABULARY].log_softmax(-1)


def worst(ours: torch.Tensor, reference: torch.Tensor | None) -> float:
    assert reference is not None
    return float((ours - reference.log_softmax(-1)).abs().max())


def backends() -> dict[str, str]:
    return {entry.name: entry.backend for entry in PROCESS_PLAN.entries.values()}


# Names of formats.


@pytest.mark.parametrize(
    ("form", "alias", "format_class"),
    [
        ("gptq", None, Gptq),
        ("gptq", NAME, Gptq),
        ("gptq", "gptq", Gptq),
        ("gptq", "gptq_marlin", Gptq),
        ("gptq", "auto_gptq", Gptq),
        ("awq", None, Awq),
        ("awq", NAME, Awq),
        ("awq", "awq", Awq),
        ("awq", "awq_marlin", Awq),
        ("awq", "auto_awq", Awq),
        ("compressed-tensors", None, CompressedTensors),
        ("compressed-tensors", NAME, CompressedTensors),
        ("compressed-tensors", "compressed-tensors", CompressedTensors),
    ],
)
def test_every_name_of_a_format_leads_to_it(
    form: str, alias: str | None, format_class: type, llama: Callable[[str], Checkpoint]
) -> None:
    found = quant_config(llama(form).quantized, quantization=alias)
    assert found.get_name() == NAME
    assert type(found) is CompressedLinearConfig
    assert type(found.format) is format_class


@pytest.mark.parametrize(("form", "alias"), [("gptq", "awq"), ("awq", "compressed-tensors")])
def test_the_name_of_another_format_is_vllms_error(
    form: str, alias: str, llama: Callable[[str], Checkpoint]
) -> None:
    with pytest.raises(ValueError, match=r"does not match the quantization method"):
        quant_config(llama(form).quantized, quantization=alias)


@pytest.mark.parametrize("form", QUANTS)
def test_the_config_goes_to_the_engines_process(
    form: str, llama: Callable[[str], Checkpoint]
) -> None:
    """vLLM pickles it; there it must say the same of every module."""
    checkpoint = llama(form)
    config = quant_config(checkpoint.quantized)
    copy = pickle.loads(pickle.dumps(config))
    assert type(copy) is type(config)
    assert copy.format == config.format
    assert copy.file.modules == config.file.modules
    module = min(checkpoint.modules)
    assert copy.resolve(module, "linear") == config.resolve(module, "linear")
    with loaded(checkpoint.quantized, skip_tokenizer_init=True) as model:
        pickle.dumps(model.config.quant_config)


def test_registering_twice_is_harmless(llama: Callable[[str], Checkpoint]) -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    from vllm.compressed_linear.plugin import register

    register()
    register()
    assert QUANTIZATION_METHODS.count(NAME) == 1
    assert get_quantization_config(NAME) is CompressedLinearConfig
    assert type(quant_config(llama("gptq").quantized)) is CompressedLinearConfig
    assert type(quant_config(llama("gptq").quantized).format) is Gptq


OFF = """
import sys
from tests.support.model_loading import engine_args
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
import vllm.envs
config = engine_args(sys.argv[1], "bfloat16", skip_tokenizer_init=True).create_engine_config()
print(type(config.quant_config).__module__, type(config.quant_config).__name__)
print("compressed_linear" in QUANTIZATION_METHODS,
      "VLLM_COMPRESSED_LINEAR_PLAN" in vllm.envs.environment_variables,
      [name for name in ("formats", "integration", "prepare")
       if f"vllm.compressed_linear.{name}" in sys.modules])
"""


def test_switched_off_vllm_is_as_it_was(llama: Callable[[str], Checkpoint]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFF, str(llama("gptq").quantized)],
        env=environment(**{settings.ENABLE: "0"}),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.strip().splitlines()[-2:]
    assert first == "vllm.model_executor.layers.quantization.auto_gptq AutoGPTQConfig"
    assert second == "False False []"


# Models that are not quantized.


def test_an_unquantized_model_opts_in(llama: Callable[[str], Checkpoint]) -> None:
    checkpoint = llama("gptq")
    ours = log_probabilities(checkpoint.ideal, checkpoint.input_ids, quantization=NAME)
    assert worst(ours, checkpoint.logits) <= 1e-4
    kinds = {entry.kind for entry in PROCESS_PLAN.entries.values()}
    assert kinds == {"linear", "lm_head"}
    assert PROCESS_PLAN.prepared == PROCESS_PLAN.expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_unquantized_model_is_as_near_as_in_stock_vllm(
    dtype: str, llama: Callable[[str], Checkpoint]
) -> None:
    checkpoint = llama("gptq")
    stock = log_probabilities(checkpoint.ideal, checkpoint.input_ids, dtype=dtype)
    ours = log_probabilities(checkpoint.ideal, checkpoint.input_ids, dtype=dtype, quantization=NAME)
    assert backends()
    assert worst(ours, checkpoint.logits) <= 1.2 * worst(stock, checkpoint.logits)


@pytest.mark.parametrize("form", QUANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(form: str, dtype: str, llama: Callable[[str], Checkpoint]) -> None:
    """As near to fp32 as stock vLLM is with the dequantized weights."""
    checkpoint = llama(form)
    stock = log_probabilities(checkpoint.ideal, checkpoint.input_ids, dtype=dtype)
    ours = log_probabilities(checkpoint.quantized, checkpoint.input_ids, dtype=dtype)
    assert worst(ours, checkpoint.logits) <= 1.2 * worst(stock, checkpoint.logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "granite-moe-experts-fused"])
def test_experts_of_an_unquantized_model_stay_with_vllm(name: str, tmp_path: Path) -> None:
    checkpoint = write(FAMILIES[name], Quant("gptq"), tmp_path)
    ours = log_probabilities(checkpoint.ideal, checkpoint.input_ids, quantization=NAME)
    assert worst(ours, checkpoint.logits) <= 1e-4
    assert backends()
    assert not any("experts" in layer for layer in backends())


# Ways to load.


@pytest.mark.parametrize("form", QUANTS)
def test_dummy_weights(form: str, llama: Callable[[str], Checkpoint]) -> None:
    checkpoint = llama(form)
    ours = log_probabilities(checkpoint.quantized, checkpoint.input_ids, load_format="dummy")
    assert bool(torch.isfinite(ours).all())
    assert PROCESS_PLAN.prepared == PROCESS_PLAN.expected > 0


def test_models_of_the_transformers_library(tmp_path: Path) -> None:
    """vLLM's fallback for families it has no model of, here forced upon one that it has.

    One test, as vLLM wraps the library's classes for good when it first builds one.
    """
    family = Family("smollm3", "SmolLM3ForCausalLM")
    for form, checkpoint in {f: write(family, q, tmp_path / f) for f, q in QUANTS.items()}.items():
        ours = log_probabilities(
            checkpoint.quantized, checkpoint.input_ids, model_impl="transformers"
        )
        assert worst(ours, checkpoint.logits) <= 1e-4, form
        assert set(backends().values()) == {"cpu"}
        assert PROCESS_PLAN.prepared == PROCESS_PLAN.expected


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_a_tied_head_is_not_quantized_whatever_the_config_says(form: str, tmp_path: Path) -> None:
    family = FAMILIES["gemma-tied"]
    checkpoint = write(family, QUANTS[form], tmp_path)
    edit_config(checkpoint.quantized, {"lm_head": True} if form == "gptq" else {"ignore": []})
    ours = log_probabilities(checkpoint.quantized, checkpoint.input_ids)
    assert worst(ours, checkpoint.logits) <= 1e-4


# What is left to vLLM.


def edit_config(path: Path, changes: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))


def test_scales_of_the_kv_cache_go_to_vllm(tmp_path: Path) -> None:
    from vllm.model_executor.layers.attention import Attention

    checkpoint = write(LLAMA, QUANTS["compressed-tensors"], tmp_path)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    edit_config(checkpoint.quantized, {"kv_cache_scheme": scheme | {"symmetric": True}})
    file = checkpoint.quantized / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([0.5 + layer])
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([0.25 + layer])
    save_file(tensors, file)
    with loaded(checkpoint.quantized, "bfloat16", skip_tokenizer_init=True) as model:
        attention = [m for m in model.model.modules() if isinstance(m, Attention)]
        assert {layer.kv_cache_dtype for layer in attention} == {"fp8"}
        assert [float(layer._k_scale) for layer in attention] == [0.5, 1.5]
        assert [float(layer._v_scale) for layer in attention] == [0.25, 1.25]
    delegated = {layer for layer, backend in backends().items() if backend == DELEGATED}
    assert delegated == {f"model.layers.{layer}.self_attn.attn" for layer in range(2)}
