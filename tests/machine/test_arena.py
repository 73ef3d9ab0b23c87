# SPDX-License-Identifier: Apache-2.0
"""Tensors of the arena follow each other, are apart, and give their memory back."""

from __future__ import annotations

import copy
import gc
import mmap
import pickle
from pathlib import Path

import pytest
import torch

from vllm.compressed_linear.machine.arena import Arena

MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_tensors_follow_each_other_from_a_huge_page_on() -> None:
    arena = Arena()
    first = arena.empty((3, 1000), torch.uint8)
    second = arena.empty((7, 5), torch.bfloat16)
    third = arena.empty((2, 2, 2), torch.int32)
    assert first.data_ptr() % (2 * MIB) == 0
    assert second.data_ptr() - first.data_ptr() == 3008
    assert third.data_ptr() - second.data_ptr() == 128
    for tensor in (first, second, third):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_one_is_written_without_the_others() -> None:
    arena = Arena()
    tensors = [arena.empty((n,), torch.uint8) for n in (1, 63, 64, 65, 4096, 100_000)]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    for value, tensor in enumerate(tensors):
        assert tensor.eq(value).all()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda tensor: pickle.loads(pickle.dumps(tensor))]
)
def test_a_copy_is_one_of_the_tensor_alone(duplicate: object) -> None:
    arena = Arena()
    arena.empty((8 * MIB,), torch.uint8)
    tensor = arena.empty((10, 16), torch.float32).normal_()
    copied = duplicate(tensor)  # type: ignore[operator]
    assert torch.equal(copied, tensor)
    assert copied.untyped_storage().nbytes() == tensor.nbytes


def test_memory_goes_back_when_nothing_holds_a_tensor() -> None:
    arena = Arena()
    kept = arena.empty((1000,), torch.uint8).fill_(7)
    gone = arena.empty((96 * MIB,), torch.uint8).fill_(1)
    view = gone[5:].view(torch.int8)
    after = arena.empty((1000,), torch.uint8).fill_(9)
    del gone
    gc.collect()
    before = resident_bytes()
    assert view[0] == 1
    del view
    gc.collect()
    assert before - resident_bytes() > 90 * MIB
    assert kept.eq(7).all()
    assert after.eq(9).all()


def test_memory_is_taken_where_it_is_written() -> None:
    gc.collect()
    before = resident_bytes()
    arena = Arena()
    tensor = arena.empty((200 * MIB,), torch.uint8)
    tensor[: 10 * MIB].fill_(1)
    assert resident_bytes() - before < 16 * MIB


def test_a_tensor_larger_than_a_block_and_the_end_of_one() -> None:
    arena = Arena()
    small = arena.empty((100,), torch.uint8)
    large = arena.empty((600 * MIB,), torch.uint8)
    large[-1] = 3
    other = arena.empty((100,), torch.uint8)
    assert large[-1] == 3
    assert large.data_ptr() % (2 * MIB) == 0
    assert not 0 <= small.data_ptr() - large.data_ptr() < large.nbytes
    assert not 0 <= other.data_ptr() - large.data_ptr() < large.nbytes


def test_an_empty_tensor_takes_nothing() -> None:
    arena = Arena()
    assert arena.empty((0, 16), torch.uint8).shape == (0, 16)
