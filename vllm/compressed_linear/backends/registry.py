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
from vllm.compressed_linear.backends.measurements import Measurements
from vllm.compressed_linear.machine.cost import expected_seconds, mix
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor

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
_OWN = "own"
_LOADED: set[str] = set()
"""Values of the entry points that were loaded, and ``_OWN``."""


@cache
def _installed_entry_points() -> tuple[EntryPoint, ...]:
    """Looking through all installed packages takes tens of milliseconds."""
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


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
    """Every registered backend, our own and those of installed packages.

    Raises ``BackendPackageError`` if one of those cannot be loaded.
    """
    from vllm.compressed_linear import backends as own

    # Once each, so that what was unregistered stays away.
    if _OWN not in _LOADED:
        own.register_all()
        _LOADED.add(_OWN)
    for point in _installed_entry_points():
        if point.value not in _LOADED:
            _load(point)
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
    # Whatever a package of somebody else raises, the user must see which one it is.
    except Exception as error:
        package = "" if point.dist is None else f" of {point.dist.name} {point.dist.version}"
        raise BackendPackageError(
            f"entry point {point.name} = {point.value}{package} gives no backend: "
            f"{type(error).__name__}: {error}; mend or uninstall it"
        ) from error


@dataclass(frozen=True)
class Candidate:
    """One backend's standing for one descriptor. ``seconds``: expected time of a call, None when it
    was declined; ``measured``: it comes from the tune file and not from the backend's estimate;
    ``asked_only``: it quantises x on its own account, so it is only taken where it is named."""

    name: str
    verdict: Verdict
    priority: int = 0
    seconds: float | None = None
    variant: str = ""
    measured: bool = False
    asked_only: bool = False


ChosenBy = Literal["asked for", "tuned", "cost model"]


@dataclass(frozen=True)
class Selection:
    """Who runs a descriptor and the full record of the others, best first."""

    chosen: type[QuantLinearMethod]
    variant: str
    candidates: tuple[Candidate, ...]
    chosen_by: ChosenBy = "cost model"

    @property
    def rejected(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if not c.verdict)

    @property
    def also_able(self) -> tuple[Candidate, ...]:
        """Backends that could run it within the standard contract and rank lower."""
        return tuple(
            c
            for c in self.candidates
            if c.verdict and c.name != self.chosen.name and not c.asked_only
        )


def rank(
    descriptor: CompressedLinearDescriptor,
    platform: Platform,
    measurements: Measurements | None = None,
) -> tuple[Candidate, ...]:
    """All backends: able ones best first, ``reference`` last of them, those that have to be named,
    then the declined ones.

    Best is the least expected time over the device's ``cost.mix``. Backends that ``measurements``
    has for this descriptor go before those of which there is only an estimate.
    """
    measurements = measurements or Measurements()
    platform = replace(platform, measured=platform.measured or measurements.limits)
    measured = measurements.of(descriptor)
    found = []
    for name, registration in backends().items():
        backend, priority = registration.backend, registration.priority
        verdict = backend.can_implement(descriptor, platform)
        if not verdict:
            found.append(Candidate(name, verdict, priority))
            continue
        variant = backend.variant(descriptor, platform)
        asked_only = backend.own_activation(descriptor) is not None
        known = measured.get(name)
        if known is not None and known.variant == variant:
            seconds, is_measured = known.expected, True
        else:
            estimate = partial(backend.seconds, descriptor, platform)
            seconds = expected_seconds(estimate, mix(platform.device))
            is_measured = False
        found.append(Candidate(name, verdict, priority, seconds, variant, is_measured, asked_only))

    def key(c: Candidate) -> tuple[bool, bool, bool, int, bool, float, str]:
        return (
            not c.verdict,
            c.asked_only,
            c.name == REFERENCE,
            -c.priority,
            not c.measured,
            c.seconds or 0.0,
            c.name,
        )

    return tuple(sorted(found, key=key))


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
    ``measurements`` are those of the tune file. A backend that quantises x on its own account has
    to be named.
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
        able = [c for c in able if not c.asked_only]
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
