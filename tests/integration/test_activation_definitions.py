# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with quantized inputs, as whole models, against definitions in numpy.

Rounding x turns its last bit into a step of a code now and then, and the rest of the model
magnifies that to 0.3 in a logit; which x that happens to depends on the order of additions. So the
definition's model compares its x with the one of ours at every layer, and then rounds ours: all
codes are the same, and everything else is computed by each on its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoint_definitions import (
    DEFINITIONS,
    Input,
    Single,
    Tensors,
    modules_of,
)
from tests.support.checkpoints import (
    COPIES,
    assert_matches_reference,
    checkpoint,
    checkpoint_reference,
    checkpoint_tensors,
    checkpoints,
    quantizes_inputs,
)
from tests.support.choice import use_backend
from tests.support.model_loading import loaded, logits

Inputs = dict[str, Single]
"""x [M, K] of each module, tokens of all prompts one after another."""


NAMES = checkpoints(quantizes_inputs)
"""All of these have a definition."""


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_the_definition_are_those_of_the_makers_library(name: str) -> None:
    definition, reference = DEFINITIONS[name], checkpoint_reference(name)
    modules = modules_of(checkpoint(name))
    assert len(modules) == 14
    for module, tensors in modules.items():
        weight = torch.from_numpy(definition.weight(tensors)).float()
        assert_matches_reference(weight, reference, module)


def run_ours(name: str) -> tuple[torch.Tensor, Inputs]:
    """Log-probabilities [batch, tokens, vocabulary] of vLLM's model, and x of its layers."""
    modules = modules_of(checkpoint(name))
    found: dict[str, list[torch.Tensor]] = {}

    def recorder(members: list[str]) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def record(layer: Any, given: tuple[torch.Tensor, ...]) -> None:
            for member in members:
                found.setdefault(member, []).append(given[0].clone())

        return record

    with loaded(checkpoint(name)) as model:
        for layer_name, layer in model.model.named_modules():
            parent, _, last = layer_name.rpartition(".")
            packed = model.model.packed_modules_mapping.get(last)
            members = [f"{parent}.{m}" for m in packed] if packed else [layer_name]
            if all(member in modules for member in members):
                layer.register_forward_pre_hook(recorder(members))
        ours = logits(model, checkpoint_reference(name)["input_ids"])
    return torch.log_softmax(ours, -1), {m: torch.cat(x).numpy() for m, x in found.items()}


@torch.no_grad()
def run_definition(
    name: str, quantize: Input, given: Inputs | None = None
) -> tuple[torch.Tensor, float]:
    """Log-probabilities of the transformers library's fp32 model with the definition's weights and
    ``quantize`` before each of them. If ``given``, it is these x that are quantized; and how far a
    token of the model's own is from them at most, relative to its largest channel."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = json.loads((checkpoint(name) / "config.json").read_text())
    config.pop("quantization_config", None)
    built = LlamaForCausalLM(
        AutoConfig.for_model(config.pop("model_type"), **config, attn_implementation="eager")
    )
    built = built.float().eval()
    modules, others = modules_of(checkpoint(name)), checkpoint_tensors(name)
    apart = [0.0]

    def hook(module: str, tensors: Tensors) -> Callable[[Any, tuple[torch.Tensor]], Any]:
        def prepare(layer: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (x,) = arguments
            flat = x.flatten(0, -2).numpy()
            if given is not None:
                own, flat = flat, given[module]
                error = np.abs(own - flat).max(1) / np.abs(flat).max(1)
                apart.append(float(error.max()))
            return (torch.from_numpy(quantize(flat, tensors)).float().reshape(x.shape),)

        return prepare

    for key, value in built.state_dict().items():
        module = key.rpartition(".")[0]
        if module not in modules:
            value.copy_(others[key])
            continue
        tensors = modules[module]
        value.copy_(torch.from_numpy(DEFINITIONS[name].weight(tensors)))
        built.get_submodule(module).register_forward_pre_hook(hook(module, tensors))
    result = built(checkpoint_reference(name)["input_ids"]).logits
    return torch.log_softmax(result, -1), max(apart)


@pytest.mark.parametrize("backend", ["reference", ""])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_its_definition(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend:
        use_backend(monkeypatch, backend)
    ours, inputs = run_ours(name)
    assert len(inputs) == 14
    expected, apart = run_definition(name, DEFINITIONS[name].x, inputs)
    assert apart <= 1e-5
    assert float((ours - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", [name for name in NAMES if DEFINITIONS[name].makers])
def test_the_makers_function_of_x_explains_its_logits(name: str) -> None:
    """These differ from ours at every token. With the maker's function in the definition, at most
    tokens they do not."""
    makers, reference = DEFINITIONS[name].makers, checkpoint_reference(name)
    assert makers is not None
    imported = COPIES / name / "reference" / "imported.safetensors"
    told = load_file(imported) if imported.is_file() else reference
    expected = torch.log_softmax(told["logits_actquant"], -1)
    theirs, _ = run_definition(name, makers)
    defined, _ = run_definition(name, DEFINITIONS[name].x)
    assert float((theirs - expected).abs().amax(-1).median()) <= 1e-4
    assert float((defined - expected).abs().amax(-1).median()) >= 0.1


@pytest.mark.parametrize("name", ["quark-int8", "quark-int4_fp8"])
def test_quark_computes_of_the_file_what_the_definition_says(name: str) -> None:
    """The ``logits_actquant`` of the zoo are those of the model in memory before it was exported;
    ``imported.safetensors`` has what Quark 0.13 computes after loading the file."""
    told = load_file(COPIES / name / "reference" / "imported.safetensors")["logits_actquant"]
    definition = DEFINITIONS[name]
    ours, _ = run_definition(name, definition.makers or definition.x)
    assert float((ours - torch.log_softmax(told, -1)).abs().max()) <= 1e-4
