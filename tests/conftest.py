# SPDX-License-Identifier: Apache-2.0
"""Fixtures and settings of all tests. Plain functions that tests share are in ``tests.support``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support.cpu_library import ISAS, ISAS_INT8
from tests.support.no_torchvision import torchvision_or_stand_in
from tests.support.unit import is_unit

# Nobody's own measurements decide what a test sees.
os.environ.setdefault("VLLM_COMPRESSED_LINEAR_TUNE_FILE", "off")

settings.register_profile(
    "default",
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("quick", settings.get_profile("default"), max_examples=10)
settings.load_profile("default")


def pytest_sessionstart() -> None:
    """Processes that share the cores share the threads too: on two cores, two processes of two
    threads each mostly wait for one another. Tests of threads set their own number."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests are marked by where they are."""
    for item in items:
        if is_unit(item.path) and not item.get_closest_marker("needs_vllm"):
            item.add_marker("unit")


@pytest.fixture
def w4a16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets ``W4A16``: what is tested multiplies 4-bit weights with x as it is."""
    from tests.support.stock_vllm import W4A16

    for name, value in W4A16.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def no_int4_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses experts of 4 bits on the CPU, as it does on one without AMX."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

    monkeypatch.setattr(CPUExpertsInt4, "_supports_current_device", staticmethod(lambda: False))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set."""
    torch.ops.compressed_linear.select_isa("floats", request.param)
    yield request.param
    torch.ops.compressed_linear.select_isa("floats", "")


@pytest.fixture(params=ISAS_INT8)
def isa_int8(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set for integer activations."""
    torch.ops.compressed_linear.select_isa("integers", request.param)
    yield request.param
    torch.ops.compressed_linear.select_isa("integers", "")


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Backends that a test registers or removes are put back afterwards."""
    from vllm.compressed_linear.backends import registry

    known = dict(registry._REGISTERED)
    points = set(registry._LOADED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(known)
    registry._LOADED.clear()
    registry._LOADED.update(points)


@pytest.fixture
def inspect_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM inspects each model class in a process of its own, which takes seconds."""
    from vllm.model_executor.models import registry

    def inspect(self: Any) -> Any:
        return registry._ModelInfo.from_model_cls(self.load_model_cls())

    monkeypatch.setattr(registry._LazyRegisteredModel, "inspect_model_cls", inspect)


@pytest.fixture(scope="module")
def torchvision() -> Iterator[None]:
    with torchvision_or_stand_in():
        yield
