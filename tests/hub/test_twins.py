# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints with published configurations as they are compute what their plain twins do.

Routed experts are plain in both. All linear layers are compared, with inputs quantized as the
format defines where it quantizes them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.architectures import layer_outputs
from tests.support.hub.checkpoints import Twins, names, published, write_twins
from tests.support.hub.selection import NotWrittenError
from tests.support.stock_vllm import fp32_options
from tests.support.tiny_checkpoints import LOADED_INCOMPLETELY_BY_VLLM
from vllm.compressed_linear.integration.config import NAME
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.prepare.plan import DELEGATED

pytestmark = pytest.mark.usefixtures("inspect_in_process", "torchvision")

TYPICAL = names(
    [
        "Qwen-Qwen2.5-7B-Instruct-AWQ",
        "hugging-quants-Meta-Llama-3.1-8B-Instruct-GPTQ-INT4",
        "RedHatAI-Qwen3-4B-Instruct-2507-quantized.w4a16",
        "user9-grug-27b-AutoRound-W4A16-RTN",
        "Qwen-Qwen3-32B-FP8",
        "google-gemma-4-E4B-it-qat-mobile-ct",
        "nvidia-Qwen3-8B-NVFP4",
    ]
)
"""One of each method and kind of scheme; the others are slow."""
OTHERS = [name for name in published() if name not in TYPICAL]

FACTORS = (16, 8, 4, 2)
WEIGHTS_ONLY = 1e-4
INPUTS_TOO = 1e-3
OUTPUTS_TOO = 1e-2
"""Largest error of a layer's output relative to its size: with quantized inputs or outputs, few
elements fall on the other side of a rounding."""


@pytest.fixture(autouse=True)
def memory_given_back() -> Iterator[None]:
    """Loading exempts what is there from collection, which would keep every model."""
    yield
    gc.unfreeze()
    gc.collect()


def twins_that_vllm_loads(name: str, path: Path) -> tuple[Twins, dict[str, torch.Tensor]]:
    """The smallest whose plain twin vLLM loads, and what the layers of that give. Skips if there is
    none."""
    one, why = published()[name], []
    if one.architecture in LOADED_INCOMPLETELY_BY_VLLM:
        pytest.skip("vLLM leaves a parameter without value")
    for factor in FACTORS:
        try:
            twins = write_twins(one, path / str(factor), factor)
            if not twins.modules:
                why.append(
                    "no weight is large enough, or only those of routed experts are quantized"
                )
                continue
            return twins, layer_outputs(twins.plain, **fp32_options(one.architecture))
        except NotWrittenError as error:
            pytest.skip(str(error))
        except Exception as error:  # heads that cannot be divided, no class, or no memory
            why.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    pytest.skip(f"vLLM loads no small {one.architecture} here: {'; '.join(dict.fromkeys(why))}")


def error_of(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-20))


def compare(name: str, path: Path) -> None:
    twins, plain = twins_that_vllm_loads(name, path)
    options = fp32_options(published()[name].architecture)
    sides = {found for found in twins.modules.values() if found != (None, None)}
    with_sides = [
        {layer: y if of_y is None else of_y(y) for layer, y in outputs.items()}
        for of_x, of_y in sides
        for outputs in [layer_outputs(twins.plain, of_x, **options)]
    ]
    if "quantize_config.json" in published()[name].side_files:
        options["quantization"] = NAME  # early tools wrote nothing into config.json
    ours = layer_outputs(twins.quantized, **options)
    assert PROCESS_PLAN.prepared == PROCESS_PLAN.expected > 0
    assert ours.keys() == plain.keys()
    limit = OUTPUTS_TOO if any(of_y for _, of_y in sides) else INPUTS_TOO
    wrong, by_sides = {}, 0
    for layer, found in ours.items():
        error = error_of(found, plain[layer])
        others = min((error_of(found, o[layer]) for o in with_sides), default=1.0)
        by_sides += error > WEIGHTS_ONLY and others <= limit
        if error > WEIGHTS_ONLY and others > limit:
            wrong[layer] = (error, others)
    assert not wrong, json.dumps(wrong, indent=1)
    if sides:
        assert by_sides, "no input was quantized"
    plans = [entry for entry in PROCESS_PLAN.entries.values() if entry.backend != DELEGATED]
    assert "reference" not in {entry.backend for entry in plans}


@pytest.mark.parametrize("name", TYPICAL)
def test_published_configurations_give_what_they_mean(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_all_published_configurations_give_what_they_mean(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)
