# SPDX-License-Identifier: Apache-2.0
"""The tune file: measurements of ``vllm-compressed-linear tune``, read while serving.

JSON::

    {"format": "vllm-compressed-linear tune file", "version": 2,
     "machines": [
       {"key": {"cpu": …, "isa": …, "threads": …, "package": …, "torch": …, "vllm": …, "layout": …},
        "limits": {"read": bytes a second, "fp32": …, "bf16": …, "int8": operations a second},
        "layers": [
          {"layer": the descriptor in one line, "descriptor": {its fields},
           "backends": {NAME: {"variant": …, "seconds": {M: median of one call},
                               "spread": {M: half of its 95 % interval, as a part of it}}}}]}]}

It may have measurements of several machines, thread counts and versions. Serving uses only those
whose whole key equals that of the process.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.atomic_file import replace_text
from vllm.compressed_linear.machine.cost import expected_seconds, mix_of
from vllm.compressed_linear.machine.limits import MachineLimits
from vllm.compressed_linear.machine.platform import NATIVE_LIBRARY, Platform
from vllm.compressed_linear.settings import default_tune_file
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor

FORMAT = "vllm-compressed-linear tune file"
VERSION = 2


class TuneFileError(ValueError):
    """Not a tune file, a damaged one, or one of another version."""


@dataclass(frozen=True)
class MachineKey:
    """Conditions of measurements other than the descriptor. ``isa`` and ``layout``: of our compiled
    library, empty without it."""

    cpu: str
    isa: str
    threads: int
    package: str
    torch: str
    vllm: str
    layout: str

    @classmethod
    def of(cls, platform: Platform) -> MachineKey | None:
        """The key of this process, or None for a platform that is not the CPU or GPU it runs on.
        ``cpu`` is a GPU's name where it is one, with its multiprocessors."""
        device = platform.cpu
        if platform.device != "cpu":
            device = platform.gpu and f"{platform.gpu}, {platform.compute_units} multiprocessors"
        if not device:
            return None
        on_cpu = platform.device == "cpu"
        built = NATIVE_LIBRARY in platform.ops
        return cls(
            cpu=device,
            isa=native.isa() if built and on_cpu else "",
            threads=platform.threads if on_cpu else 0,
            package=version("vllm-compressed-linear"),
            torch=str(torch.__version__),
            # The parent package is loaded already; importing its version takes seconds.
            vllm=str(getattr(sys.modules.get("vllm"), "__version__", "")),
            layout=native.layout_id() if built else "",
        )

    def differences(self, other: MachineKey) -> list[str]:
        """Fields that differ from ``other``, as text."""
        mine, its = asdict(self), asdict(other)
        return [
            f"{name} {mine[name]!r} (here {its[name]!r})"
            for name in mine
            if mine[name] != its[name]
        ]


@dataclass(frozen=True)
class Measured:
    """One backend on one descriptor. ``seconds``: M → median time of a call, for every M of the
    device's ``cost.mix``; ``spread``: M → half of the median's 95 % interval, as a part of it."""

    variant: str
    seconds: Mapping[int, float]
    spread: Mapping[int, float]

    @property
    def expected(self) -> float:
        """Average seconds of a call of the mix."""
        return expected_seconds(self.seconds.__getitem__, mix_of(self.seconds))


@dataclass
class Measurements:
    """Measurements under one key. ``layers``: descriptor → backend."""

    limits: MachineLimits | None = None
    layers: dict[CompressedLinearDescriptor, dict[str, Measured]] = field(default_factory=dict)

    def of(self, descriptor: CompressedLinearDescriptor) -> Mapping[str, Measured]:
        """Backend → measurement; empty without measurements."""
        return self.layers.get(descriptor, {})


def read(path: Path) -> dict[MachineKey, Measurements]:
    """Read the whole file. Raises ``TuneFileError`` if it is not a valid tune file, ``OSError`` if
    it cannot be read."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise TuneFileError(f"tune file {path} is invalid JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise TuneFileError(f"{path} is not a tune file: it has no format {FORMAT!r}")
    if data.get("version") != VERSION:
        raise TuneFileError(
            f"tune file {path} has version {data.get('version')!r}, expected {VERSION}"
        )
    try:
        return {
            _key(machine["key"]): Measurements(
                None if machine["limits"] is None else MachineLimits(**machine["limits"]),
                dict(_layer(layer) for layer in machine["layers"]),
            )
            for machine in data["machines"]
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TuneFileError(
            f"tune file {path} is damaged: {type(error).__name__}: {error}"
        ) from None


def _key(data: Mapping[str, Any]) -> MachineKey:
    for f in fields(MachineKey):
        if type(data[f.name]).__name__ != f.type:
            raise ValueError(f"key.{f.name} is {data[f.name]!r}, expected {f.type}")
    return MachineKey(**data)


def _layer(data: Mapping[str, Any]) -> tuple[CompressedLinearDescriptor, dict[str, Measured]]:
    backends = {
        name: Measured(entry["variant"], _numbers(entry["seconds"]), _numbers(entry["spread"]))
        for name, entry in data["backends"].items()
    }
    return CompressedLinearDescriptor.from_json(data["descriptor"]), backends


def _numbers(data: Mapping[str, Any]) -> dict[int, float]:
    numbers = {m: float(data[str(m)]) for m in mix_of([int(m) for m in data])}
    wrong = [value for value in numbers.values() if not (math.isfinite(value) and value >= 0)]
    if wrong:
        raise ValueError(f"{wrong[0]} is not a valid time in seconds")
    return numbers


def write(path: Path, machines: Mapping[MachineKey, Measurements]) -> None:
    """Replace the file atomically: readers see the old or the new one."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "machines": [
            {
                "key": asdict(key),
                "limits": None if found.limits is None else asdict(found.limits),
                "layers": [
                    {
                        "layer": str(descriptor),
                        "descriptor": descriptor.to_json(),
                        "backends": {name: asdict(measured) for name, measured in backends.items()},
                    }
                    for descriptor, backends in found.layers.items()
                ],
            }
            for key, found in machines.items()
        ],
    }
    replace_text(path, json.dumps(data, indent=1, sort_keys=False) + "\n")


def merge(path: Path, key: MachineKey, new: Measurements) -> None:
    """Merge ``new`` into the file, or create it. New measurements replace those of the same
    backend, descriptor and key. Raises ``TuneFileError`` for another kind of file, which is not
    overwritten."""
    machines = read(path) if path.exists() else {}
    known = machines.setdefault(key, Measurements())
    known.limits = new.limits or known.limits
    for descriptor, backends in new.layers.items():
        known.layers.setdefault(descriptor, {}).update(backends)
    write(path, machines)


@dataclass(frozen=True)
class Tuned:
    """Measurements for one process. ``note``: why an existing file is not used, or empty."""

    measurements: Measurements = field(default_factory=Measurements)
    note: str = ""


def load(file: str, platform: Platform) -> Tuned:
    """The measurements of ``file`` (see ``Settings.tune_file``) that apply to ``platform``. Read
    once for each process, so that all layers are chosen from the same state of the file."""
    key = MachineKey.of(platform)
    return Tuned() if key is None or not file else _load(file, key)


@lru_cache(maxsize=16)
def _load(file: str, key: MachineKey) -> Tuned:
    path = Path(file)
    if not path.is_file():
        given = path != default_tune_file()
        return Tuned(note=f"tune file {file} does not exist" if given else "")
    try:
        machines = read(path)
    except (TuneFileError, OSError) as error:
        return Tuned(note=f"{error}; it is not used")
    if key in machines:
        return Tuned(machines[key])
    closest = min((other.differences(key) for other in machines), key=len, default=["nothing"])
    return Tuned(note=f"tune file {file} is not used: it was made with {', '.join(closest)}")
