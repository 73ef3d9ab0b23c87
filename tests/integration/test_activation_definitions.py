# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with quantized inputs, as whole models, against definitions in numpy."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoint_definitions import DEFINITIONS, Input, Tensors, modules_of
from tests.support.checkpoints import (
    COPIES,
    assert_matches_reference,
    checkpoint,
    checkpoint_reference,
    checkpoints,
    quantizes_inputs,
)
from tests.support.choice import use_backend
from tests.support.defined_models import Defined, assert_computes_its_definition, run_defined
from tests.support.model_loading import loaded

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


def layers_of(name: str, quantize: Input) -> dict[str, Defined]:
    """The layers of a checkpoint by its definition, with ``quantize`` before each of them."""
    weight = DEFINITIONS[name].weight

    def layer(tensors: Tensors) -> Defined:
        return Defined(weight(tensors), lambda x: quantize(x, tensors))

    return {m: layer(tensors) for m, tensors in modules_of(checkpoint(name)).items()}


def run(name: str, quantize: Input) -> torch.Tensor:
    input_ids = checkpoint_reference(name)["input_ids"]
    return run_defined(checkpoint(name), input_ids, layers_of(name, quantize))[0]


@pytest.mark.parametrize("backend", ["reference", ""])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_its_definition(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend:
        use_backend(monkeypatch, backend)
    layers = layers_of(name, DEFINITIONS[name].x)
    input_ids = checkpoint_reference(name)["input_ids"]
    with loaded(checkpoint(name)) as model:
        inputs = assert_computes_its_definition(model, checkpoint(name), input_ids, layers)
    assert len(inputs) == 14


@pytest.mark.parametrize("name", [name for name in NAMES if DEFINITIONS[name].makers])
def test_the_makers_function_of_x_explains_its_logits(name: str) -> None:
    """These differ from ours at every token. With the maker's function in the definition, at most
    tokens they do not."""
    makers, reference = DEFINITIONS[name].makers, checkpoint_reference(name)
    assert makers is not None
    imported = COPIES / name / "reference" / "imported.safetensors"
    told = load_file(imported) if imported.is_file() else reference
    expected = torch.log_softmax(told["logits_actquant"], -1)
    theirs, defined = run(name, makers), run(name, DEFINITIONS[name].x)
    assert float((theirs - expected).abs().amax(-1).median()) <= 1e-4
    assert float((defined - expected).abs().amax(-1).median()) >= 0.1


@pytest.mark.parametrize("name", ["quark-int8", "quark-int4_fp8"])
def test_quark_computes_of_the_file_what_the_definition_says(name: str) -> None:
    """The ``logits_actquant`` of the zoo are those of the model in memory before it was exported;
    ``imported.safetensors`` has what Quark 0.13 computes after loading the file."""
    told = load_file(COPIES / name / "reference" / "imported.safetensors")["logits_actquant"]
    definition = DEFINITIONS[name]
    ours = run(name, definition.makers or definition.x)
    assert float((ours - torch.log_softmax(told, -1)).abs().max()) <= 1e-4
