# SPDX-License-Identifier: Apache-2.0
"""The record of a load knows every byte that was written, whichever way a loader does it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm.compressed_linear.checkpoint.load_record import LoadRecord

Loader = Callable[[torch.Tensor, dict[str, torch.Tensor]], None]


def loaded(target: torch.Tensor, files: dict[str, torch.Tensor], loader: Loader) -> LoadRecord:
    """What is recorded while ``loader`` fills ``target`` from ``files``."""
    record = LoadRecord([target])
    with record:
        loader(target, dict(record.weights(files.items())))
    return record


def rows(target: torch.Tensor, files: dict[str, torch.Tensor]) -> None:
    target[:2].copy_(files["a"][:2])


def converted_and_joined(target: torch.Tensor, files: dict[str, torch.Tensor]) -> None:
    joined = torch.cat([files["a"].float()[:2], files["b"].to(torch.float64).float()[2:]])
    target.copy_(joined.t().contiguous().t())


def collected_in_a_buffer(target: torch.Tensor, files: dict[str, torch.Tensor]) -> None:
    buffer = files["a"].new_empty(4, 6)
    buffer[:3] = files["a"][:3]
    buffer[3:] = files["b"][3:]
    target.data[:] = buffer


def by_columns(target: torch.Tensor, files: dict[str, torch.Tensor]) -> None:
    target.narrow(1, 0, 3).copy_(files["a"][:, :3])
    target.narrow(1, 4, 2).copy_(files["b"][:, 4:])


def transposed(target: torch.Tensor, files: dict[str, torch.Tensor]) -> None:
    target.t().copy_(files["a"].t())


def as_bytes(target: torch.Tensor, files: dict[str, torch.Tensor]) -> None:
    target.view(torch.uint8)[1:].copy_(files["a"].view(torch.uint8)[1:])


def with_zeros_beyond(target: torch.Tensor, files: dict[str, torch.Tensor]) -> None:
    target[:3].data.copy_(files["a"][:3])
    target[3:].data.fill_(0)


def changed_in_place(target: torch.Tensor, files: dict[str, torch.Tensor]) -> None:
    target.add_(1).mul_(2)


def one_column_over_another(target: torch.Tensor, files: dict[str, torch.Tensor]) -> None:
    for column in (0, 1, 1, 2, 2, 2):
        target[:, column] = files["a"][:, column]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("loader", "missing", "gaps", "names"),
    [
        (rows, 12, [(48, 96)], ["a"]),
        (converted_and_joined, 0, [], ["a", "b"]),
        (collected_in_a_buffer, 0, [], ["a", "b"]),
        (by_columns, 4, [(12 + 24 * row, 16 + 24 * row) for row in range(4)], ["a", "b"]),
        (transposed, 0, [], ["a"]),
        (as_bytes, 6, [(0, 24)], ["a"]),
        (with_zeros_beyond, 0, [], ["a"]),
        (changed_in_place, 24, [(0, 96)], []),
        (one_column_over_another, 12, [(12 + 24 * r, 24 + 24 * r) for r in range(4)], ["a"]),
    ],
)
def test_what_a_loader_writes(
    loader: Loader, missing: int, gaps: list[tuple[int, int]], names: list[str], device: str
) -> None:
    target = torch.nn.Parameter(torch.ones(4, 6, device=device), requires_grad=False)
    files = {name: torch.ones(4, 6, device=device) for name in ("a", "b", "unused")}
    record = loaded(target, files, loader)
    fill = record.fill(target)
    assert fill is not None
    assert fill.missing == 4 * missing
    assert list(fill.gaps) == gaps
    assert list(fill.names) == names
    assert record.taken == set(names)
    assert record.held.keys() == files.keys()


def test_a_parameter_that_a_loader_assigns() -> None:
    target = torch.nn.Parameter(torch.ones(4), requires_grad=False)

    def assign(target: torch.Tensor, files: dict[str, torch.Tensor]) -> None:
        target.data = files["a"].double()

    record = loaded(target, {"a": torch.zeros(4), "b": torch.zeros(4)}, assign)
    assert record.fill(target) is None
    assert record.taken == {"a"}


def test_parameters_of_one_storage_share_what_was_written() -> None:
    table = torch.nn.Parameter(torch.ones(4, 2), requires_grad=False)
    head = torch.nn.Parameter(table.data[:3], requires_grad=False)
    record = LoadRecord([table, head])
    with record:
        for _, weight in record.weights([("table", torch.zeros(4, 2))]):
            table.data.copy_(weight)
    fill = record.fill(head)
    assert fill is not None
    assert not fill.gaps
    assert fill.names == ("table",)


def test_biases_without_effect() -> None:
    record = LoadRecord([])
    weights = {"a.bias": torch.zeros(2), "b.bias": torch.ones(2), "a.weight": torch.zeros(2)}
    assert list(record.weights(weights.items())) == list(weights.items())
    assert record.zero_biases == {"a.bias"}


PIECES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 3), st.integers(0, 4)),
    max_size=6,
)


@given(PIECES, st.permutations([0, 1, 2]))
def test_gaps_are_the_elements_that_no_piece_covers(
    pieces: list[tuple[int, int, int, int]], axes: list[int]
) -> None:
    """Pieces of any axes of a tensor of any order, against what is really in it."""
    target = torch.zeros(3, 4, 5).permute(axes)
    start = LoadRecord([target])
    with start:
        for dim0, dim1, length0, length1 in pieces:
            piece = target[dim0 : dim0 + length0, :, dim1 : dim1 + length1]
            piece.copy_(torch.ones(piece.shape))
    fill = start.fill(target)
    assert fill is not None
    memory = torch.as_strided(target, (60,), (1,))
    marked = torch.ones(60)
    for first, stop in fill.gaps:
        assert stop > first
        marked[first // 4 : stop // 4] = 0
    assert torch.equal(memory, marked)
