# SPDX-License-Identifier: Apache-2.0
"""Backends that are registered, and which of them runs a descriptor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeVar, overload

from vllm.compressed_linear.backends.base import QuantLinearMethod, Verdict
from vllm.compressed_linear.backends.measurements import Measured, Measurements
from vllm.compressed_linear.machine.cost import expected_seconds, mix
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor

DISTRIBUTION = "vllm-compressed-linear"
ENTRY_POINT_GROUP = "vllm.compressed_linear_backends"
REFERENCE = "reference"

B = TypeVar("B", bound=type[QuantLinearMethod])


@dataclass(frozen=True)
class Registration:
    """A backend class with its priority: higher goes before any cost comparison."""

    backend: type[QuantLinearMethod]
    priority: int


class NoBackendError(RuntimeError):
    """No registered backend, or not the one the user asked for, can run a layer."""


class BackendPackageError(RuntimeError):
    """An installed package announces a backend that cannot be loaded."""


_REGISTERED: dict[str, Registration] = {}
_LOADED: set[str] = set()
"""Values of the entry points that were loaded."""


@cache
def _installed_entry_points() -> tuple[EntryPoint, ...]:
    """Those of this package first, so that a name taken twice is the other package's error.

    Looking through all installed packages takes tens of milliseconds. ``BackendPackageError`` where
    this package has none.
    """
    found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: not _is_own(point))
    if not found or not _is_own(found[0]):
        raise BackendPackageError(
            f"{DISTRIBUTION} has no entry points in the group {ENTRY_POINT_GROUP}, which name its "
            "own backends: it was not installed, or by an older version of its source tree. "
            "Install it again: pip install --no-build-isolation --editable . (or make setup)"
        )
    return tuple(found)


def _is_own(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == DISTRIBUTION


@overload
def register_backend(backend: B, *, priority: int = 0) -> B: ...


@overload
def register_backend(backend: None = None, *, priority: int = 0) -> Callable[[B], B]: ...


def register_backend(backend: B | None = None, *, priority: int = 0) -> B | Callable[[B], B]:
    """Class decorator: ``@register_backend`` or ``@register_backend(priority=10)``.

    Registering the same class again changes nothing, not its priority either; another class under a
    taken name is a ``ValueError``, an incomplete one a ``TypeError``.
    """

    def add(cls: B) -> B:
        _validate(cls)
        known = _REGISTERED.get(cls.name)
        if known is not None and _identity(known.backend) != _identity(cls):
            raise ValueError(
                f"backend name {cls.name!r} is taken by {_identity(known.backend)}; "
                f"{_identity(cls)} needs another (or unregister_backend first)"
            )
        _REGISTERED.setdefault(cls.name, Registration(cls, priority))
        return cls

    return add if backend is None else add(backend)


def unregister_backend(name: str) -> None:
    """Remove a backend; ``KeyError`` if there is none of that name."""
    del _REGISTERED[name]


def _identity(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _validate(cls: type[QuantLinearMethod]) -> None:
    if not (inspect.isclass(cls) and issubclass(cls, QuantLinearMethod)):
        raise TypeError(f"{cls!r} is not a subclass of QuantLinearMethod")
    missing = sorted(cls.__abstractmethods__)
    missing += [name for name in ("name", "capabilities") if not hasattr(cls, name)]
    if hasattr(cls, "capabilities") and cls.capabilities.lookup:
        missing += ["embedding"] if cls.embedding is QuantLinearMethod.embedding else []
    if missing:
        raise TypeError(f"backend {_identity(cls)} lacks {', '.join(missing)}")


def backends() -> dict[str, Registration]:
    """Every registered backend: those that entry points of installed packages name, ours among
    them, and those that were registered in code.

    Raises ``BackendPackageError`` if an entry point cannot be loaded.
    """
    for point in _installed_entry_points():
        if point.value not in _LOADED:
            _load(point)
            # Once each, so that what was unregistered stays away.
            _LOADED.add(point.value)
    return dict(_REGISTERED)


def _load(point: EntryPoint) -> None:
    """``point`` names a backend class, a function that registers some, or a module that did."""
    try:
        loaded: Any = point.load()
        if isinstance(loaded, type):
            register_backend(loaded)
        elif callable(loaded):
            loaded()
    # Whatever a package raises, the user must see which one it is.
    except Exception as error:
        package = "" if point.dist is None else f" of {point.dist.name} {point.dist.version}"
        raise BackendPackageError(
            f"failed to load backend {point.name} = {point.value}{package}: "
            f"{type(error).__name__}: {error}; fix or uninstall the package"
        ) from error


@dataclass(frozen=True)
class Candidate:
    """One backend's standing for one descriptor. ``seconds``: expected time of a call, None when it
    was declined; ``measured``: it comes from the tune file and not from the backend's estimate;
    ``only_if_named``: it changes the result by quantizing x, so it must be requested by name;
    ``hardware_tested``: see ``QuantLinearMethod``, for able ones."""

    name: str
    verdict: Verdict
    priority: int = 0
    seconds: float | None = None
    variant: str = ""
    measured: bool = False
    only_if_named: bool = False
    hardware_tested: bool = True


ChosenBy = Literal["asked for", "tuned", "cost model"]


@dataclass(frozen=True)
class Selection:
    """Chosen backend plus every other candidate, with reasons, best first."""

    chosen: type[QuantLinearMethod]
    variant: str
    candidates: tuple[Candidate, ...]
    chosen_by: ChosenBy = "cost model"

    @property
    def rejected(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if not c.verdict)

    @property
    def untested(self) -> tuple[str, ...]:
        """Names of the backends that could run it and have never run on such hardware."""
        return tuple(c.name for c in self.candidates if c.verdict and not c.hardware_tested)

    @property
    def also_able(self) -> tuple[Candidate, ...]:
        """Backends that could run it within the standard contract and rank lower."""
        return tuple(
            c
            for c in self.candidates
            if c.verdict and c.name != self.chosen.name and not c.only_if_named
        )


def rank(
    descriptor: CompressedLinearDescriptor,
    platform: Platform,
    measurements: Measurements | None = None,
) -> tuple[Candidate, ...]:
    """All backends: able ones best first, ``reference`` last of them, those that have to be named,
    then the declined ones.

    Best is the least expected time over the device's ``cost.mix``, and ``measurements``, those of
    the tune file, go before estimates: see ``_policy``.
    """
    measurements = measurements or Measurements()
    platform = replace(platform, measured=platform.measured or measurements.limits)
    measured = measurements.of(descriptor)
    found = [
        _candidate(registration, descriptor, platform, measured.get(name))
        for name, registration in backends().items()
    ]
    able = [c for c in found if c.verdict]
    allowed = [c for c in able if not c.only_if_named]
    to_be_named = [c for c in able if c.only_if_named]
    declined = [c for c in found if not c.verdict]
    return tuple(
        c for group in (allowed, to_be_named, declined) for c in sorted(group, key=_policy)
    )


def _candidate(
    registration: Registration,
    descriptor: CompressedLinearDescriptor,
    platform: Platform,
    measured: Measured | None,
) -> Candidate:
    backend, priority = registration.backend, registration.priority
    verdict = backend.can_implement(descriptor, platform)
    if not verdict:
        return Candidate(backend.name, verdict, priority)
    variant = backend.variant(descriptor, platform)
    if measured is not None and measured.variant == variant:
        seconds, is_measured = measured.expected, True
    else:
        estimate = partial(backend.seconds, descriptor, platform)
        seconds, is_measured = expected_seconds(estimate, mix(platform.device)), False
    only_if_named = backend.contract(descriptor).activation is not None
    return Candidate(
        backend.name,
        verdict,
        priority,
        seconds,
        variant,
        is_measured,
        only_if_named,
        backend.hardware_tested(platform, variant),
    )


def _policy(c: Candidate) -> tuple[bool, int, bool, float, str]:
    """The order of candidates: ``reference`` last, then the higher priority, then what was measured
    before what is only estimated, whatever the times, then the least time, then the name."""
    return (c.name == REFERENCE, -c.priority, not c.measured, c.seconds or 0.0, c.name)


def select(
    descriptor: CompressedLinearDescriptor,
    platform: Platform,
    *,
    override: str | None = None,
    strict: bool = False,
    layer: str = "",
    measurements: Measurements | None = None,
) -> Selection:
    """The backend for ``descriptor``.

    ``override`` names the only one allowed; ``strict`` refuses ``reference`` unless it was named;
    ``measurements`` are those of the tune file. A backend that changes the
    result by quantizing x must be named.
    Raises ``NoBackendError`` with every reason.
    """
    candidates = rank(descriptor, platform, measurements)
    able = [c for c in candidates if c.verdict]
    where = f"layer {layer} ({descriptor})" if layer else str(descriptor)
    if override is not None:
        able = [c for c in able if c.name == override]
        if not able:
            named = [c for c in candidates if c.name == override]
            why = (
                "\n  " + "\n  ".join(named[0].verdict.reasons)
                if named
                else f" it is not registered (registered: {', '.join(backends())})"
            )
            raise NoBackendError(f"backend {override!r} was asked for but cannot run {where}:{why}")
    else:
        able = [c for c in able if not c.only_if_named]
        if strict:
            able = [c for c in able if c.name != REFERENCE]
    if not able:
        lines = [f"  {c.name}: {c.verdict}" for c in candidates]
        if strict:
            lines.append("  (reference could run it; strict mode refuses it)")
        raise NoBackendError(f"no backend can run {where}:\n" + "\n".join(lines))
    chosen = able[0]
    chosen_by: ChosenBy = "tuned" if chosen.measured else "cost model"
    return Selection(
        _REGISTERED[chosen.name].backend,
        chosen.variant,
        candidates,
        chosen_by if override is None else "asked for",
    )
