# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of model families, each written once for the tests of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.support.architectures import Family, write
from tests.support.synthetic import Quant

CheckpointOf = Callable[[str, str], Path]
"""Directory of a family's checkpoint in a form: "gptq", "ct", or "" for unquantized."""


def written_once(
    families: Mapping[str, Family], directories: pytest.TempPathFactory
) -> CheckpointOf:
    """Writer of the checkpoints of ``families``, by their names."""
    written: dict[tuple[str, str], Path] = {}

    def get(family: str, form: str) -> Path:
        if (family, form) not in written:
            where = directories.mktemp(family)
            found = write(families[family], Quant(form or "gptq"), where, reference=False)
            written[family, form] = found.quantized if form else found.ideal
        return written[family, form]

    return get
