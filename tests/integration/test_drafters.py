# SPDX-License-Identifier: Apache-2.0
"""Targets and drafters in one process: each has a head and a table of its own, or one in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.drafters import (
    VOCABULARY,
    Eagle3,
    after,
    drafts,
    loaded_with_drafter,
    write_clock,
    write_eagle3,
)
from tests.support.table_models import Bits, TableModel

QUANTIZED_HEAD = TableModel("llama", tied=False, table=None, head=Bits(8))
GROUPED_HEAD = replace(QUANTIZED_HEAD, head=Bits(4, 32))
PLAIN_HEAD = TableModel("llama", tied=False, table=None)
QUANTIZED_TABLE = TableModel("llama", tied=False, table=Bits(8), head=Bits(8))
TIED_QUANTIZED_TABLE = TableModel("llama", table=Bits(8))
TIED_PLAIN_TABLE = TableModel("llama", table=None)

HALF = torch.arange(VOCABULARY).view(-1, 2, 8)[:, 1].flatten()
"""Every second hour."""
EVERY_TOKEN = torch.arange(VOCABULARY)

OWN_HEAD = {
    "both-quantized": (QUANTIZED_HEAD, Eagle3()),
    "both-quantized-in-groups": (
        replace(QUANTIZED_HEAD, head=Bits(4, 32)),
        Eagle3(head=Bits(4, 32)),
    ),
    "both-plain": (PLAIN_HEAD, Eagle3(head=None)),
    "quantized-and-plain": (QUANTIZED_HEAD, Eagle3(head=None)),
    "plain-and-quantized": (PLAIN_HEAD, Eagle3()),
    "tied-to-a-quantized-table": (TIED_QUANTIZED_TABLE, Eagle3(own_table=True)),
    "tied-to-a-plain-table": (TIED_PLAIN_TABLE, Eagle3(own_table=True)),
    "quantized-table": (QUANTIZED_TABLE, Eagle3()),
    "unquantized-drafter": (QUANTIZED_TABLE, Eagle3(linear=None, head=None)),
    "half-the-vocabulary": (QUANTIZED_HEAD, Eagle3(tokens=HALF)),
    "half-the-vocabulary-plain": (QUANTIZED_TABLE, Eagle3(head=None, tokens=HALF)),
}
SHARED_HEAD = {
    "quantized": (QUANTIZED_HEAD, Eagle3(own_head=False)),
    "plain": (PLAIN_HEAD, Eagle3(own_head=False)),
    "tied-to-a-quantized-table": (TIED_QUANTIZED_TABLE, Eagle3(own_head=False)),
    "tied-to-a-plain-table": (TIED_PLAIN_TABLE, Eagle3(own_head=False)),
    "unquantized-drafter": (QUANTIZED_TABLE, Eagle3(linear=None, own_head=False)),
    "equal-quantized": (QUANTIZED_HEAD, Eagle3(tells=1)),
}


def speculative(path: Path, **changes: Any) -> dict[str, Any]:
    return {"method": "eagle3", "model": str(path), "num_speculative_tokens": 1} | changes


@pytest.mark.parametrize("case", OWN_HEAD)
def test_a_drafter_keeps_its_own_head(case: str, tmp_path: Path) -> None:
    target, drafter = OWN_HEAD[case]
    write_clock(tmp_path / "target", target)
    write_eagle3(tmp_path / "drafter", drafter)
    tokens = EVERY_TOKEN if drafter.tokens is None else drafter.tokens
    with loaded_with_drafter(tmp_path / "target", speculative(tmp_path / "drafter")) as (
        model,
        proposer,
    ):
        found = drafts(model, proposer, tokens)
        own_table = proposer.model.model.embed_tokens is not model.model.model.embed_tokens
        assert proposer.model.lm_head is not model.model.lm_head
    assert found.tolist() == after(tokens, 2).tolist()
    assert own_table == drafter.own_table


@pytest.mark.parametrize("case", SHARED_HEAD)
def test_a_drafter_without_a_head_of_its_own_uses_the_target_s(case: str, tmp_path: Path) -> None:
    target, drafter = SHARED_HEAD[case]
    write_clock(tmp_path / "target", target)
    write_eagle3(tmp_path / "drafter", drafter)
    with loaded_with_drafter(tmp_path / "target", speculative(tmp_path / "drafter")) as (
        model,
        proposer,
    ):
        found = drafts(model, proposer, EVERY_TOKEN)
        assert proposer.model.lm_head is model.model.lm_head
        assert proposer.model.model.embed_tokens is model.model.model.embed_tokens
    assert found.tolist() == after(EVERY_TOKEN, 1).tolist()


def test_a_head_is_prepared_once_and_its_natural_weight_is_freed(tmp_path: Path) -> None:
    write_clock(tmp_path / "target", PLAIN_HEAD)
    write_eagle3(tmp_path / "drafter", Eagle3(head=None))
    with loaded_with_drafter(tmp_path / "target", speculative(tmp_path / "drafter")) as (
        model,
        proposer,
    ):
        for head in (model.model.lm_head, proposer.model.lm_head):
            assert head.weight.shape == (0, 128)
