# SPDX-License-Identifier: Apache-2.0
"""The table of paths: which instruction set multiplies how many tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.cpu_library import ISAS, ISAS_INT8
from tests.support.messages import saying
from tests.support.weight_only_ops import make_layer
from vllm.compressed_linear.machine import native

pytestmark = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))

NARROW = "floats/int/bfloat16"
FIRST, LAST = (ISAS[0], ISAS[-1]) if ISAS else ("", "")


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    before = native.paths()
    yield
    native.select_paths(before)


def test_a_call_takes_the_path_of_its_number_of_tokens() -> None:
    native.select_paths(f"{NARROW} {LAST} 2 {FIRST} 7 {LAST}")
    layer = make_layer((70, 96, 32), "uint4")
    x = torch.randn(9, layer.k).bfloat16()
    native.reset_call_counts()
    found = {m: layer(x[:m]) for m in (1, 2, 3, 7, 8, 9)}
    counts = native.call_counts()
    assert counts == {
        f"linear/planes/{LAST}/uint4": 4 if FIRST != LAST else 6,
        f"linear/planes/{FIRST}/uint4": 2 if FIRST != LAST else 6,
    }
    for m, out in found.items():
        isa = FIRST if m in (3, 7) else LAST
        torch.ops.compressed_linear.select_isa("floats", isa)
        try:
            assert torch.equal(layer(x[:m]), out)
        finally:
            torch.ops.compressed_linear.select_isa("floats", "")


def test_a_forced_instruction_set_goes_before_every_path() -> None:
    native.select_paths(f"{NARROW} {LAST}")
    torch.ops.compressed_linear.select_isa("floats", FIRST)
    try:
        assert f"{NARROW} {FIRST}\n" in native.paths()
    finally:
        torch.ops.compressed_linear.select_isa("floats", "")
    assert f"{NARROW} {LAST}\n" in native.paths()


def test_what_is_not_named_takes_the_best() -> None:
    native.select_paths("")
    best = {"floats": FIRST, "integers": ISAS_INT8[0]}
    for line in native.paths().splitlines():
        name, isa = line.split()
        assert isa == best[name.partition("/")[0]]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("floats/narrow/int3 generic", ("floats/narrow/int3", "class")),
        (f"{NARROW} z80", ("z80", "can run", "generic")),
        (f"{NARROW} generic 4", ("larger M",)),
        (NARROW, ("larger M",)),
        (f"{NARROW} generic 4 generic 4 generic", ("ascend",)),
        (f"{NARROW} generic 0 generic", ("ascend",)),
        (f"{NARROW} generic generic", ("number", "generic")),
        (f"{NARROW} {'generic 1 ' * 5}generic", ("ascend",)),
        (f"{NARROW} generic 1 generic 2 generic 3 generic 4 generic", ("more than 4",)),
        # An instruction set without kernels of that kind.
        (f"{NARROW} i8mm", ("i8mm",)),
    ],
)
def test_a_wrong_table_is_refused_and_changes_nothing(line: str, words: tuple[str, ...]) -> None:
    native.select_paths(f"{NARROW} {LAST} 5 {FIRST}")
    before = native.paths()
    with pytest.raises(ValueError, match=saying("select_paths", *words)):
        native.select_paths(f"integers/bytes/token generic\n{line}")
    assert native.paths() == before
