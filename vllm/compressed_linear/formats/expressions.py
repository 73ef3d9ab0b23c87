# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of a configuration, matched in bounded time.

``re`` cannot be interrupted, and a few characters from a stranger's configuration can make it run
for years. So the steps of a match are bounded from the parsed expression. Nearly all expressions
that tools write need few, and are matched by ``re``; the others by ``regex``, which can be stopped.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import regex

from vllm.compressed_linear.formats.resolution import ConfigError

MAX_LENGTH = 64 << 10
"""Characters of an expression."""
PLAIN_NAME = 128
"""Up to this length of a module's name, ``re`` matches expressions of bounded steps."""
PLAIN_STEPS = 2.0**24
"""Some 0.2 seconds in the worst case."""
MATCH_SECONDS = 1.0
"""CPU time of one match by ``regex``."""
SLOW_SECONDS = 50e-6
FIELD_SECONDS = 5.0
"""CPU time of the slow matches of one field in total, beyond what expressions of tools need."""
SECONDS_PER_MATCH = 10e-6
SECONDS_PER_EXPRESSION = 1e-3


@dataclass(frozen=True)
class Expression:
    """A compiled expression. ``bounded``: the same for ``regex``, None if ``re`` may match it."""

    plain: re.Pattern[str]
    bounded: Any

    def matcher(self, name: str, *, search: bool) -> Callable[[], Any]:
        """Match ``name`` from its beginning, or anywhere. Raises ``TimeoutError``."""
        if self.bounded is None and len(name) <= PLAIN_NAME:
            return lambda: (self.plain.search if search else self.plain.match)(name)
        bounded = self.bounded or _for_regex(self.plain.pattern)  # rare: a very long name
        method = bounded.search if search else bounded.match
        return lambda: method(name, timeout=MATCH_SECONDS)


@cache
def expression(text: str) -> Expression:
    """Compile an expression. ``re`` forgets all but 512, and configurations have more.

    Raises ``ConfigError`` that says what is wrong, without the expression.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(f"has {len(text)} characters, expected at most {MAX_LENGTH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sets that may change their meaning some day
            plain = re.compile(text)
            steps = _steps(parser.parse(text))
    except (re.error, OverflowError) as error:
        raise ConfigError(f"is not a regular expression: {error}") from None
    except RecursionError:
        raise ConfigError("is nested too deeply for a regular expression") from None
    return Expression(plain, None if steps <= PLAIN_STEPS else _for_regex(text))


@cache
def is_expression(text: str) -> bool:
    """Whether a text is a valid regular expression."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


class TimedMatching:
    """The expressions of one field, and the CPU time that they took."""

    def __init__(self, field: str) -> None:
        self.field = field
        self._expressions: dict[str, Expression] = {}
        self._allowed = FIELD_SECONDS
        self._used = 0.0

    def compiled(self, text: str, entry: str) -> Expression:
        """Compile an expression, once. ``entry``: as the configuration has it, for messages.

        Raises ``ConfigError`` that names the field and the entry.
        """
        if text not in self._expressions:
            begun = time.thread_time()
            try:
                self._expressions[text] = expression(text)
            except ConfigError as error:
                raise ConfigError(f"{self.field}: {shortened(entry)} {error}") from None
            self._allowed += SECONDS_PER_EXPRESSION
            self._spend(time.thread_time() - begun, entry)
        return self._expressions[text]

    def matches(self, text: str, names: Sequence[str], entry: str, *, search: bool = False) -> bool:
        """Whether an expression matches one of ``names`` from its beginning, or anywhere.

        Raises ``ConfigError`` that names the field and the entry: it is invalid or takes too long.
        """
        found = self.compiled(text, entry)
        for name in names:
            self._allowed += SECONDS_PER_MATCH
            match = found.matcher(name, search=search)
            try:
                begun = time.perf_counter()
                matched = match()
                if time.perf_counter() - begun > SLOW_SECONDS:
                    # Once more in CPU time, which other processes do not lengthen.
                    begun = time.thread_time()
                    match()
                    self._spend(time.thread_time() - begun, entry)
            except TimeoutError:
                raise self._too_slow(entry) from None
            if matched is not None:
                return True
        return False

    def _spend(self, seconds: float, entry: str) -> None:
        self._used += seconds
        if self._used > self._allowed:
            raise self._too_slow(entry)

    def _too_slow(self, entry: str) -> ConfigError:
        return ConfigError(
            f"{self.field}: {shortened(entry)} takes too long to match; expected a regular "
            "expression without nested repetitions, or names of modules"
        )


def _for_regex(text: str) -> Any:
    """The same expression for ``regex``. Raises ``ConfigError`` where it would mean another."""
    if re.search(r"\[\[?:|\{(?!\d*,?\d*\})", text):
        raise ConfigError("is too complex for a regular expression with such brackets")
    try:
        return regex.compile(text, regex.V0)
    except (regex.error, OverflowError, RecursionError, MemoryError) as error:
        raise ConfigError(f"is too complex for a regular expression: {error}") from None


def _steps(parsed: Any) -> float:
    """An upper bound of the steps in which a parsed expression matches a name of ``PLAIN_NAME``
    characters, ``inf`` if there may be none: in how many ways its parts can share the name."""
    product = 1.0
    for op, argument in parsed:
        product *= _ways(op, argument)
    return product


def _ways(op: Any, argument: Any) -> float:
    if op in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
        low, high, body = argument
        inner = _steps(body)
        if high == 1:
            return inner if low else 1 + inner
        if inner > 1 or body.getwidth()[0] != body.getwidth()[1]:
            return inner**high if low == high and high < PLAIN_NAME else inf
        return 1 + min(high, PLAIN_NAME) - min(low, PLAIN_NAME)
    if op is ops.BRANCH:
        return sum(map(_steps, argument[1]))
    if op is ops.SUBPATTERN:
        return _steps(argument[-1])
    if op is ops.ATOMIC_GROUP:
        return _steps(argument)
    if op in (ops.ASSERT, ops.ASSERT_NOT):
        return _steps(argument[1])
    if op in (ops.GROUPREF, ops.GROUPREF_EXISTS):
        return inf
    return 1.0


def shortened(text: str) -> str:
    """A text of a configuration in quotes, printable, and not too long for a message."""
    shown = ascii(text)
    return shown if len(shown) <= 200 else f"{shown[:200]}… ({len(text)} characters)"
