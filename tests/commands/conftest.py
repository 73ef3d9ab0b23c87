# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def only_toys(clean_registry: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing registered but ``reference`` and the backends of ``timed_toys``."""
    # Not at the top: tests without vLLM read this file too.
    from tests.support.timed_toys import Fast, Slow, Toy
    from vllm.compressed_linear.backends import measurements, registry
    from vllm.compressed_linear.machine import timing

    for name in registry.backends():
        if name != registry.REFERENCE:
            registry.unregister_backend(name)
    registry.register_backend(Fast)
    registry.register_backend(Slow)
    measurements._load.cache_clear()
    monkeypatch.setattr(Toy, "sizes", [])
    # The rates of a machine on which only toys take time.
    monkeypatch.setattr(timing, "best_rate", lambda work, action, seconds, now: 12345678.9)
    yield
    measurements._load.cache_clear()
