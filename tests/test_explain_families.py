# SPDX-License-Identifier: Apache-2.0
"""``explain`` for many model families: names, shards and the split are those of the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from architectures import FAMILIES, WITHOUT_LOGITS, write
from model_loading import loaded
from synthetic import Quant
from test_explain import explained, loaded_parts, planned_parts


@pytest.mark.parametrize("family", FAMILIES | WITHOUT_LOGITS)
def test_the_loaded_model_is_one_that_was_named(family: str, tmp_path: Path) -> None:
    known = (FAMILIES | WITHOUT_LOGITS)[family]
    path = write(known, Quant("gptq"), tmp_path, reference=False).quantized
    named = explained(path, dtype="float32")
    read = explained(path, dtype="float32", read_weights=True)
    options: dict[str, Any] = {"skip_tokenizer_init": True}
    with loaded(path, **options):
        actual = loaded_parts()
    assert not named.notes
    assert [layer.name for layer in named.layers] == list(actual)
    for layer in named.layers:
        assert actual[layer.name] in [planned_parts(layer, case) for case in layer.cases]
    for layer in read.layers:
        assert [actual[layer.name]] == [planned_parts(layer, case) for case in layer.cases]
