# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as vLLM's model runs it on our layers, and as definitions in numpy run it.

Rounding x turns its last bit into a step of a code now and then, and the rest of a model magnifies
that to 0.3 in a logit; which x that happens to depends on the order of additions. So the
definition's model compares its x with the one of ours at every layer, and then rounds ours: all
codes are the same, and everything else is computed by each on its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.support.float_definitions import Floats, Single
from tests.support.float_models import Written
from tests.support.model_loading import LoadedModel, logits

Inputs = dict[str, Single]
"""x [M, K] of each module, tokens of all prompts one after another."""


@dataclass(frozen=True)
class Defined:
    """A linear layer: its weight, float64 [N, K], and what is done to x [M, K]."""

    weight: Floats
    prepare: Callable[[Single], Floats]


def defined(files: Written) -> dict[str, Defined]:
    """The layers of a small model; not its head, whose x nothing tells."""
    return {
        module: Defined(stored.meaning, stored.prepare)
        for module, stored in files.stored.items()
        if module != "lm_head"
    }


def record_inputs(model: LoadedModel, modules: set[str]) -> Callable[[], Inputs]:
    """Record x of the layers that consist of ``modules``; the result tells all that came."""
    found: dict[str, list[torch.Tensor]] = {}

    def recorder(members: list[str]) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def record(layer: Any, given: tuple[torch.Tensor, ...]) -> None:
            for member in members:
                found.setdefault(member, []).append(given[0].clone())

        return record

    for name, layer in model.model.named_modules():
        parent, _, last = name.rpartition(".")
        packed = model.model.packed_modules_mapping.get(last)
        members = [f"{parent}.{member}" for member in packed] if packed else [name]
        if modules.issuperset(members):
            layer.register_forward_pre_hook(recorder(members))

    def recorded() -> Inputs:
        assert found.keys() == modules
        return {module: torch.cat(x).numpy() for module, x in found.items()}

    return recorded


def run_ours(
    model: LoadedModel, input_ids: torch.Tensor, modules: set[str]
) -> tuple[torch.Tensor, Inputs]:
    """Log-probabilities [batch, tokens, vocabulary] of vLLM's fp32 model, and x of ``modules``."""
    recorded = record_inputs(model, modules)
    ours = logits(model, input_ids)
    return torch.log_softmax(ours, -1), recorded()


@torch.no_grad()
def run_defined(
    path: Path, input_ids: torch.Tensor, layers: dict[str, Defined], given: Inputs | None = None
) -> tuple[torch.Tensor, float]:
    """Log-probabilities of the transformers library's fp32 model with ``layers``. If ``given``, it
    is these x that are prepared; and how far a token of the model's own is from them at most,
    relative to its largest channel."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config", None)
    built = LlamaForCausalLM(
        AutoConfig.for_model(config.pop("model_type"), **config, attn_implementation="eager")
    )
    built = built.float().eval()
    others = load_file(path / "model.safetensors")
    apart = [0.0]

    def hook(module: str) -> Callable[[Any, tuple[torch.Tensor]], tuple[torch.Tensor]]:
        def prepare(layer: Any, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (x,) = arguments
            flat = x.flatten(0, -2).numpy()
            if given is not None:
                own, flat = flat, given[module]
                error = np.abs(own - flat).max(1) / np.abs(flat).max(1)
                apart.append(float(error.max()))
            return (torch.from_numpy(layers[module].prepare(flat)).float().reshape(x.shape),)

        return prepare

    for key, value in built.state_dict().items():
        module, _, last = key.rpartition(".")
        if module not in layers or last == "bias":
            if key in others:  # a tied head is not
                value.copy_(others[key])
            continue
        value.copy_(torch.from_numpy(layers[module].weight))
        built.get_submodule(module).register_forward_pre_hook(hook(module))
    result = built(input_ids).logits
    return torch.log_softmax(result, -1), max(apart)


def assert_computes_its_definition(
    model: LoadedModel, path: Path, input_ids: torch.Tensor, layers: dict[str, Defined]
) -> Inputs:
    """Log-probabilities of the checkpoint at ``path`` are within 1e-4; returns x of every layer."""
    ours, inputs = run_ours(model, input_ids, set(layers))
    expected, apart = run_defined(path, input_ids, layers, inputs)
    assert apart <= 1e-5
    assert float((ours[..., : expected.shape[-1]] - expected).abs().max()) <= 1e-4
    return inputs
