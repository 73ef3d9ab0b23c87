# SPDX-License-Identifier: Apache-2.0
"""Mutants loaded into vLLM's own model class: the same property, with vLLM as the reader."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support.checkpoints import COPIES
from tests.support.fuzzing import configs, containers, tensors
from tests.support.fuzzing.decode import stored_layers, weight
from tests.support.fuzzing.files import Mutant, Tensor, unmutated
from tests.support.fuzzing.numbers import NoMeaningError
from tests.support.fuzzing.verdict import ERRORS, draw_mutant, judge_error
from tests.support.model_loading import loaded, logits

MUTANTS = int(os.environ.get("COMPRESSED_LINEAR_MUTANTS", "300")) // 15
DIRECTORIES = [
    COPIES / name
    for name in (
        "gptqmodel-gptq-w4-g128-sym-descact",
        "autoawq-awq-gemm-g128-asym",
        "autoround-native-mixed",
        "llmcompressor-w4a16-asym-g32",
    )
]
GROUPS = [
    tensors.MUTATORS,
    [tensors.codes, tensors.scales, tensors.group_index, tensors.zero_points, tensors.add],
    # vLLM itself, and transformers, read config.json and meet a pipe in its place.
    [m for m in containers.MUTATORS if m is not containers.special_file],
    [configs.hostile_expression],
]
PROMPT = torch.tensor([[1, 7, 40, 12, 300, 5, 99]])


def logits_of(path: Path) -> torch.Tensor:
    with loaded(path) as model:
        found: torch.Tensor = logits(model, PROMPT)
    return found


def twin(mutant: Mutant, origin: Path, directory: Path) -> Path | None:
    """The same model with the weights that the mutant's tensors say, unquantized; None if they say
    nothing."""
    whole = unmutated(origin)
    layers = stored_layers(whole.config, whole.tensors)
    found = mutant.all_tensors
    plain = {
        name: tensor
        for name, tensor in found.items()
        # vLLM alone refuses tensors that the model does not have.
        if name in whole.tensors and name.rpartition(".")[0] not in layers
    }
    try:
        for layer, stored in layers.items():
            values = weight(layer, stored, found).astype(np.float32)
            plain[f"{layer}.weight"] = Tensor("F32", values.shape, values.tobytes())
    except NoMeaningError:
        return None
    config = {k: v for k, v in whole.config.items() if k != "quantization_config"}
    Mutant(mutant.name, config, plain).write(directory)
    return directory


def ours(error: BaseException | None) -> BaseException | None:
    """The error of this package in a chain of errors: vLLM's configuration wraps it."""
    while error is not None:
        if isinstance(error, ERRORS):
            return error
        if isinstance(error, ValidationError):
            return ours(error.errors()[0].get("ctx", {}).get("error"))
        error = error.__cause__ or error.__context__
    return None


def try_loading(mutant: Mutant, directory: Path) -> None:
    origin = COPIES / mutant.name
    what = f"{mutant.name}: {'; '.join(mutant.done)}"
    (directory / "mutant").mkdir()
    mutant.write(directory / "mutant")
    try:
        found = logits_of(directory / "mutant")
    except Exception as error:
        own = ours(error)
        if own is None:
            raise
        judge_error(mutant, stored_layers(*_whole(origin)), str(own), what)
        return
    (directory / "twin").mkdir()
    expected = []
    if (path := twin(mutant, origin, directory / "twin")) is not None:
        expected.append(logits_of(path))
    if mutant.harmless:
        expected.append(logits_of(origin))
    assert expected, f"{what}: its tensors say nothing, but it was loaded"
    errors = [float((found - e).abs().max()) for e in expected]
    assert min(errors) < 1e-3, f"{what}: logits differ by {min(errors):.2g}"


def _whole(origin: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    whole = unmutated(origin)
    return whole.config, whole.tensors


@settings(
    max_examples=MUTANTS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_mutants_are_loaded_right_or_refused_clearly(data: st.DataObject) -> None:
    mutant = draw_mutant(data.draw, DIRECTORIES, GROUPS)
    directory = Path(tempfile.mkdtemp(prefix="mutant"))
    try:
        try_loading(mutant, directory)
    finally:
        shutil.rmtree(directory)
