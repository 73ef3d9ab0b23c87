# SPDX-License-Identifier: Apache-2.0
"""The rates of this machine, measured once and kept next to the tune file.

JSON::

    {"format": "vllm-compressed-linear rates", "version": 1,
     "machines": [{"cpu": …, "package": …, "rates": {"clock": …, "fma512": …, …}}]}

Every rank and every later start reads the same numbers, so all of them choose the same paths,
whatever else the machine does meanwhile. Delete the file to measure again.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm.compressed_linear.machine.atomic_file import replace_text
from vllm.compressed_linear.machine.rates import Measure

FORMAT = "vllm-compressed-linear rates"
VERSION = 1

Rates = Mapping[str, float]


class RatesFileError(ValueError):
    """Not such a file, a damaged one, or one of another version."""


@dataclass(frozen=True)
class RatesKey:
    """Conditions of a measurement: the processor (``limits.cpu_name``) and this package, whose
    loops they are. Not the threads: rates are those of one core."""

    cpu: str
    package: str

    @classmethod
    def of(cls, cpu: str) -> RatesKey:
        return cls(cpu, version("vllm-compressed-linear"))


def read(path: Path) -> dict[RatesKey, Rates]:
    """The whole file. Raises ``RatesFileError`` or ``OSError``."""
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise RatesFileError(f"{path} is not version {VERSION} of {FORMAT!r}")
        return dict(_entry(machine) for machine in data["machines"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RatesFileError):
            raise
        raise RatesFileError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _entry(data: Mapping[str, Any]) -> tuple[RatesKey, Rates]:
    rates = {str(name): float(value) for name, value in data["rates"].items()}
    wrong = [value for value in rates.values() if not (math.isfinite(value) and value > 0)]
    if wrong:
        raise ValueError(f"{wrong[0]} is not a rate")
    return RatesKey(str(data["cpu"]), str(data["package"])), rates


def kept(path: Path, key: RatesKey, measure: Measure) -> Rates:
    """The rates of ``key`` in ``path``; measured and written there if it has none, by one process
    at a time. A damaged file is replaced. Raises ``OSError`` if it cannot be read or written."""
    found = _known(path).get(key)
    if found is not None:
        return found
    with _locked(path):
        return _known(path).get(key) or _added(path, key, measure())


def _known(path: Path) -> dict[RatesKey, Rates]:
    try:
        return read(path)
    except (FileNotFoundError, RatesFileError):
        return {}


def _added(path: Path, key: RatesKey, measured: Rates) -> Rates:
    rates = {name: float(f"{value:.3g}") for name, value in measured.items()}
    machines = _known(path) | {key: rates}
    data = {
        "format": FORMAT,
        "version": VERSION,
        "machines": [asdict(other) | {"rates": dict(found)} for other, found in machines.items()],
    }
    replace_text(path, json.dumps(data, indent=1) + "\n")
    return rates


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
