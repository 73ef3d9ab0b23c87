# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of vLLM's kernel classes.

They import when they run: tests without vLLM read this file too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def fresh_answers(w4a16: None) -> Iterator[None]:
    """Tests change vLLM's classes; what was cached about them must not outlive a test."""
    from vllm.compressed_linear.backends.vllm_native import op
    from vllm.compressed_linear.backends.vllm_native.classes import mixed_precision, tables

    yield
    tables.unavailable.cache_clear()
    op.ready.cache_clear()
    mixed_precision.repacked_attributes.cache_clear()


@pytest.fixture
def doubles() -> Iterator[None]:
    """Operators of vLLM's CUDA wheel where there are none."""
    from tests.support import cuda_doubles
    from vllm.compressed_linear.backends.vllm_native import op

    cuda_doubles.install()
    cuda_doubles.CALLED.clear()
    op.ready.cache_clear()
    yield
    op.ready.cache_clear()
