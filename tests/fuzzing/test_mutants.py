# SPDX-License-Identifier: Apache-2.0
"""Mutants of every small checkpoint are read right or refused by one clear error.

``make test-fuzz N=10000`` tries N of them; the number here is a part of ``make test``.
"""

from __future__ import annotations

import faulthandler
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import COPIES, fuzzed
from tests.support.fuzzing import configs, containers, tensors
from tests.support.fuzzing.files import unmutated
from tests.support.fuzzing.reader import read
from tests.support.fuzzing.verdict import draw_mutant, try_mutant

MUTANTS = int(os.environ.get("COMPRESSED_LINEAR_MUTANTS", "300"))
DIRECTORIES = fuzzed()
GROUPS = {
    "tensors": [tensors.MUTATORS],
    "containers": [containers.MUTATORS],
    "configs": [configs.MUTATORS],
    "all": [tensors.MUTATORS, containers.MUTATORS, configs.MUTATORS],
}


@pytest.fixture(autouse=True)
def end_what_hangs() -> Iterator[None]:
    """A mutant may hang in native code, where no exception reaches it."""
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
def test_a_checkpoint_without_changes_is_read(directory: Path) -> None:
    mutant = unmutated(directory)
    mutant.must_read = True
    outcome = try_mutant(mutant, directory, read)
    assert outcome.kind in ("read", "left")


@pytest.mark.parametrize("group", GROUPS)
def test_mutants_are_read_right_or_refused_clearly(group: str) -> None:
    kinds: Counter[str] = Counter()

    @settings(
        max_examples=MUTANTS // len(GROUPS),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        faulthandler.dump_traceback_later(120, exit=True)
        mutant = draw_mutant(data.draw, DIRECTORIES, GROUPS[group])
        kinds[try_mutant(mutant, COPIES / mutant.name, read).kind] += 1

    run()
    print(f"mutants of {group}: {dict(kinds)}")
    assert kinds["read"] > MUTANTS // 50
    assert kinds["refused"] > MUTANTS // 50
