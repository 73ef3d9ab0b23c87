# SPDX-License-Identifier: Apache-2.0
"""``explain`` of mutants from headers alone: a plan or one clear error, in bounded time."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import COPIES, fuzzed
from tests.support.fuzzing import configs, containers, tensors
from tests.support.fuzzing.decode import stored_layers
from tests.support.fuzzing.files import unmutated
from tests.support.fuzzing.verdict import ERRORS, MAX_SECONDS, draw_mutant, judge_error
from vllm.compressed_linear.commands.explain import explain as explain_module
from vllm.compressed_linear.commands.explain.layers import ModelUnavailableError
from vllm.compressed_linear.integration.preparation import detect_platform

MUTANTS = int(os.environ.get("COMPRESSED_LINEAR_MUTANTS", "300")) // 5
DIRECTORIES = fuzzed()
GROUPS = [tensors.MUTATORS, containers.MUTATORS, configs.MUTATORS]


@pytest.fixture(scope="module", autouse=True)
def no_model_class() -> Iterator[None]:
    """vLLM's class of the model takes a second to be built, and states shapes of its own."""

    def unavailable(*_: Any, **__: Any) -> Any:
        raise ModelUnavailableError("the test uses headers alone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain_module, "model_layers", unavailable)
        yield


@settings(
    max_examples=MUTANTS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.data())
def test_mutants_are_explained_or_refused_clearly(data: st.DataObject) -> None:
    mutant = draw_mutant(data.draw, DIRECTORIES, GROUPS)
    whole = unmutated(COPIES / mutant.name)
    what = f"{mutant.name}: {'; '.join(mutant.done)}"
    directory = Path(tempfile.mkdtemp(prefix="mutant"))
    begun = time.process_time()
    try:
        mutant.write(directory)
        found = explain_module.explain(str(directory), platform=detect_platform())
        assert all(layer.name.isprintable() for layer in found.layers)
    except ERRORS as error:
        judge_error(mutant, stored_layers(whole.config, whole.tensors), str(error), what)
    finally:
        shutil.rmtree(directory)
    assert time.process_time() - begun < MAX_SECONDS, what
