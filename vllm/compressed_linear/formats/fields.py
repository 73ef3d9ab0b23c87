# SPDX-License-Identifier: Apache-2.0
"""Fields of a configuration with the types that they must have.

Tools and people write numbers as text, one name instead of a list, and null for a default. What can
only mean one thing is accepted; anything else raises ``ConfigError`` with the field's name, what
was found, and what was expected. Null is the same as no field.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from vllm.compressed_linear.formats.resolution import ConfigError

TOP = "quantization_config"
LONGEST_WORD = 100
LARGEST = 1 << 31
"""Limit of a number: no axis is longer."""


@dataclass(frozen=True)
class Fields:
    """The fields of one map. ``where``: the map's own name, for messages."""

    values: Mapping[Any, Any]
    where: str = TOP

    @classmethod
    def of(cls, value: Any, where: str) -> Self:
        """Raises ``ConfigError`` if ``value`` is neither a map nor null."""
        if value is not None and not isinstance(value, Mapping):
            raise wrong(where, value, "a map")
        return cls(value or {}, where)

    def __bool__(self) -> bool:
        return bool(self.values)

    def _found(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """Name and value of the first of ``names`` that is there."""
        for name in names:
            if self.values.get(name) is not None:
                return f"{self.where}.{name}", self.values[name]
        return f"{self.where}.{names[0]}", None

    def integer(self, *names: str, default: int | None = None) -> int:
        """A whole number under the first of ``names``; without a ``default`` it must be there."""
        number = self.optional_integer(*names)
        if number is None:
            number = default
        if number is None:
            keys = _cut(", ".join(map(str, self.values)))
            raise ConfigError(f"{self.where} has no {names[0]} (keys: {keys})")
        return number

    def optional_integer(self, *names: str) -> int | None:
        """A whole number under the first of ``names``; None if it is not there."""
        name, value = self._found(names)
        if value is None:
            return None
        if (number := whole(value)) is None or abs(number) > LARGEST:
            raise wrong(name, value, "int")
        return number

    def positive(self, name: str, *, default: float) -> float:
        """A positive number."""
        where, value = self._found((name,))
        if value is None:
            return default
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(value)
            if not isinstance(value, bool) and 0 < number < math.inf:
                return number
        raise wrong(where, value, "a positive number")

    def integers(self, name: str) -> list[int]:
        """Whole numbers of a list; empty if it is not there."""
        name, value = self._found((name,))
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            raise wrong(name, value, "a list of int")
        numbers = [whole(entry) for entry in value]
        if any(number is None or abs(number) > LARGEST for number in numbers):
            raise wrong(name, value, "a list of int")
        return [number for number in numbers if number is not None]

    def flag(self, name: str) -> bool | None:
        """True or false; None if it is not there."""
        name, value = self._found((name,))
        if value is None or isinstance(value, bool):
            return value
        known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
        text = str(value).strip().lower() if isinstance(value, str | int | float) else ""
        if text not in known:
            raise wrong(name, value, "true or false")
        return known[text]

    def word(self, *names: str) -> str:
        """A text in lower case under the first of ``names``; empty if it is not there."""
        name, value = self._found(names)
        if value is None:
            return ""
        if not isinstance(value, str) or len(value) > LONGEST_WORD or not value.isprintable():
            raise wrong(name, value, f"a text of at most {LONGEST_WORD} printable characters")
        return value.strip().lower()

    def names(self, name: str) -> list[str]:
        """Texts of a list, of lists in it, or a single one; empty if it is not there."""
        name, value = self._found((name,))
        return _flat(name, value)

    def fields(self, name: str) -> Fields:
        """The map ``name``; empty if it is not there."""
        name, value = self._found((name,))
        return Fields.of(value, name)

    def maps(self, name: str) -> dict[str, Fields]:
        """A map whose values are maps; empty if it is not there."""
        outer = self.fields(name)
        return {
            str(key): Fields.of(value, f"{outer.where}.{key}")
            for key, value in outer.values.items()
        }


def whole(value: Any) -> int | None:
    """``value`` as a whole number, if it is one or a text of one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, int):
        return value
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def wrong(name: str, value: Any, expected: str) -> ConfigError:
    """The error for a field of another type. Long values are cut."""
    return ConfigError(f"{name} is {_cut(ascii(value), 80)}, expected {expected}")


def _cut(text: str, length: int = 400) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _flat(name: str, value: Any, depth: int = 0) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list | tuple) or depth > 8:
        raise wrong(name, value, "a list of names")
    return [flat for entry in value for flat in _flat(name, entry, depth + 1)]
