# SPDX-License-Identifier: Apache-2.0
"""The harness finds faults: readers that are wrong in one way each do not pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import COPIES
from tests.support.fuzzing import verdict
from tests.support.fuzzing.decode import Stored
from tests.support.fuzzing.files import Mutant, unmutated
from tests.support.fuzzing.reader import Found, read
from tests.support.fuzzing.verdict import WrongError, try_mutant
from vllm.compressed_linear.checkpoint.shard import CheckpointError

ORIGIN = COPIES / "gptqmodel-gptq-w4-g128-sym-descact"
LAYER = "model.layers.1.mlp.down_proj"


def mutant() -> Mutant:
    found = unmutated(ORIGIN)
    found.done = ["something"]
    return found


def one_number_wrong(directory: Path, layers: Mapping[str, Stored]) -> Found:
    found = read(directory, layers)
    values = found.weights[LAYER].copy()
    values[3, 5] += np.abs(values).max() / 1000
    return replace(found, weights=found.weights | {LAYER: values})


def crash(directory: Path, layers: Mapping[str, Stored]) -> Found:
    raise KeyError("qweight")


def of_two_lines(directory: Path, layers: Mapping[str, Stored]) -> Found:
    raise CheckpointError(f"{LAYER} is\ndamaged")


def with_an_escape(directory: Path, layers: Mapping[str, Stored]) -> Found:
    raise CheckpointError(f"{LAYER} is \x1b[31mdamaged")


def that_names_nothing(directory: Path, layers: Mapping[str, Stored]) -> Found:
    raise CheckpointError("the checkpoint is damaged")


def slow(directory: Path, layers: Mapping[str, Stored]) -> Found:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    return read(directory, layers)


@pytest.mark.parametrize(
    ("reader", "complaint"),
    [
        (one_number_wrong, f"{LAYER} has other weights"),
        (crash, "KeyError"),
        (of_two_lines, "one clear line"),
        (with_an_escape, "one clear line"),
        (that_names_nothing, "names none"),
        (slow, "CPU time"),
    ],
)
def test_a_wrong_reader_is_found(
    reader: Callable[[Path, Mapping[str, Stored]], Found],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verdict, "MAX_SECONDS", 10.0 if reader is not slow else 0.2)
    with pytest.raises(WrongError, match=complaint):
        try_mutant(mutant(), ORIGIN, reader)


def test_a_refusal_without_need_is_found() -> None:
    found = mutant()
    found.must_read = True
    with pytest.raises(WrongError, match="without need"):
        try_mutant(found, ORIGIN, that_names_nothing)


def test_changed_tensors_are_other_weights() -> None:
    """A reader that does not look at the files would give the unchanged ones."""
    found = mutant()
    name = f"{LAYER}.qweight"
    tensor = found.tensors[name]
    found.tensors[name] = replace(tensor, data=b"\x55" + tensor.data[1:])

    def blind(directory: Path, layers: Mapping[str, Stored]) -> Found:
        return read(ORIGIN, layers)

    assert try_mutant(found, ORIGIN, read).kind == "read"
    with pytest.raises(WrongError, match=f"{LAYER} has other weights"):
        try_mutant(found, ORIGIN, blind)
