# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of the prepared-weights cache."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from vllm.compressed_linear.prepare.cache import store as cache_module


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the cache warns of."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(cache_module.__name__).addHandler(handler)
    yield found
    logging.getLogger(cache_module.__name__).removeHandler(handler)
