# SPDX-License-Identifier: Apache-2.0
"""Settings that choose a backend."""

from __future__ import annotations

import pytest

from vllm.compressed_linear import settings


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv(settings.BACKEND, f"unquantized={backend},{backend}")
