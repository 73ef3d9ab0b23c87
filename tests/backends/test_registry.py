# SPDX-License-Identifier: Apache-2.0
"""Who is registered: by the program, by this package and by other packages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest

from tests.support.messages import saying
from tests.support.toy_backends import CPU, DESCRIPTOR, Toy, toy
from vllm.compressed_linear.backends import registry
from vllm.compressed_linear.backends.base import QuantLinearMethod, Verdict  # noqa: F401  # named
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.backends.registry import (
    BackendPackageError,
    rank,
    register_backend,
    unregister_backend,
)

pytestmark = pytest.mark.usefixtures("clean_registry")


def test_our_own_are_there() -> None:
    assert {"reference", "cpu", "vllm_native"} <= set(registry.backends())
    assert registry.backends()["reference"].backend is ReferenceBackend


def test_registering_and_unregistering() -> None:
    assert register_backend(Toy) is Toy
    assert registry.backends()["toy"].backend is Toy
    register_backend(Toy)
    unregister_backend("toy")
    assert "toy" not in registry.backends()
    with pytest.raises(KeyError, match="toy"):
        unregister_backend("toy")


def test_our_own_can_be_unregistered_too() -> None:
    assert "cpu" in registry.backends()
    unregister_backend("cpu")
    assert "cpu" not in registry.backends()
    assert "cpu" not in [c.name for c in rank(DESCRIPTOR, CPU)]


def test_as_a_decorator_with_priority() -> None:
    @register_backend(priority=7)
    class Prior(Toy):
        name = "prior"

    assert registry.backends()["prior"] == registry.Registration(Prior, 7)
    register_backend(Prior)
    assert registry.backends()["prior"].priority == 7


def test_a_taken_name_names_who_has_it() -> None:
    register_backend(Toy)
    with pytest.raises(ValueError, match=saying("'toy'", f"{Toy.__module__}.Toy", "Toy_toy")):
        register_backend(toy("toy"))
    assert registry.backends()["toy"].backend is Toy
    unregister_backend("toy")
    register_backend(toy("toy"))


def test_incomplete_backends_are_refused() -> None:
    class NoApply(QuantLinearMethod):
        name = "no_apply"
        capabilities = Toy.capabilities
        seconds = Toy.seconds
        prep_weights_for_execution = Toy.prep_weights_for_execution

    with pytest.raises(TypeError, match=saying("NoApply", "apply")):
        register_backend(NoApply)
    nameless = type("Nameless", (QuantLinearMethod,), {})
    with pytest.raises(
        TypeError,
        match=saying("apply", "prep_weights_for_execution", "seconds", "name", "capabilities"),
    ):
        register_backend(nameless)
    blind = type("Blind", (Toy,), {"capabilities": replace(Toy.capabilities, lookup=True)})
    with pytest.raises(TypeError, match=saying("Blind", "embedding")):
        register_backend(blind)
    for wrong in (object, Toy(DESCRIPTOR)):
        with pytest.raises(TypeError, match=saying("QuantLinearMethod")):
            register_backend(wrong)  # type: ignore[type-var]


class FromPackage(Toy):
    name = "from_package"


class NamedAsOurs(Toy):
    name = "cpu"


def register_two() -> None:
    register_backend(toy("two_a"))
    register_backend(toy("two_b"))


def broken() -> None:
    raise ImportError("no module named libfast")


def entry_points(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    found = tuple(EntryPoint(v.split(":")[1], v, registry.ENTRY_POINT_GROUP) for v in values)
    monkeypatch.setattr(registry, "_installed_entry_points", lambda: found)


def test_entry_points_name_classes_or_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    here = __name__
    entry_points(monkeypatch, f"{here}:FromPackage", f"{here}:register_two")
    found = registry.backends()
    assert found["from_package"].backend is FromPackage
    assert {"two_a", "two_b"} <= set(found)
    assert registry.backends() == found


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """The entry points of installed packages, to be changed by a test."""
    found = list(registry.entry_points(group=registry.ENTRY_POINT_GROUP))
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    registry._installed_entry_points.cache_clear()
    registry._LOADED.clear()
    registry._REGISTERED.clear()
    yield found
    registry._installed_entry_points.cache_clear()


def test_our_own_are_named_by_entry_points_as_others_are(metadata: list[EntryPoint]) -> None:
    ours = {p.name: p.load() for p in metadata if p.dist and p.dist.name == registry.DISTRIBUTION}
    assert {name: cls.name for name, cls in ours.items()} == {name: name for name in ours}
    assert "reference" in ours
    assert set(ours.values()) <= {entry.backend for entry in registry.backends().values()}


@pytest.mark.parametrize("others", [True, False])
def test_a_tree_that_was_not_installed_says_so(metadata: list[EntryPoint], others: bool) -> None:
    metadata.clear()
    if others:
        value = f"{__name__}:FromPackage"
        metadata.append(EntryPoint("from_package", value, registry.ENTRY_POINT_GROUP))
    for _ in range(2):
        with pytest.raises(BackendPackageError, match=saying(registry.DISTRIBUTION, "pip install")):
            registry.backends()


def test_a_name_of_ours_is_the_other_package_s_error(metadata: list[EntryPoint]) -> None:
    value = f"{__name__}:NamedAsOurs"
    metadata.insert(0, EntryPoint("anything", value, registry.ENTRY_POINT_GROUP))
    message = saying("anything", value, "ValueError", "cpu", "CpuBackend")
    with pytest.raises(BackendPackageError, match=message):
        registry.backends()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (f"{__name__}:broken", ("broken", "ImportError: no module named libfast")),
        (f"{__name__}:Verdict", ("TypeError", "Verdict", "QuantLinearMethod")),
        ("no_such_module:Backend", ("no_such_module:Backend", "ModuleNotFoundError")),
    ],
)
def test_a_package_that_is_broken_is_named_every_time(
    value: str, message: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_points(monkeypatch, value)
    for _ in range(2):
        with pytest.raises(BackendPackageError, match=saying(*message, "uninstall")):
            registry.backends()
