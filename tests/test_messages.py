# SPDX-License-Identifier: Apache-2.0
"""Tests of messages accept other words, and neither another name nor another number."""

from __future__ import annotations

import re

import pytest

from tests.support.messages import says

TEXT = "model.k_proj.scales has shape [4, 256], expected [256, 4]: element is 'int4', -2 of 2.5"


@pytest.mark.parametrize(
    "parts",
    [
        ("k_proj", "scales", [4, 256], [256, 4]),
        ("model.k_proj.scales", "'int4'", -2, 2.5),
        ("shape", "element", "int4"),
        (re.compile(r"\.(scales|zeros)\b"), [4, 256]),
    ],
)
def test_names_and_numbers_in_any_words(parts: tuple[object, ...]) -> None:
    assert says(TEXT, *parts)
    assert says("\n".join(str(getattr(part, "pattern", part)) for part in parts), *parts[1:])


@pytest.mark.parametrize(
    "parts",
    [
        ("q_proj",),
        ("proj",),
        ("scale",),
        ([256, 4], [4, 256]),
        ([4, 25],),
        (2,),
        (5,),
        (25,),
        ("int",),
        ("scales", "model"),
    ],
)
def test_other_names_and_numbers_or_another_order_fail(parts: tuple[object, ...]) -> None:
    assert not says(TEXT, *parts)
