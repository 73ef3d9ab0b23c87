# SPDX-License-Identifier: Apache-2.0
"""GPTQModel's ``dynamic``: overrides by module (gptqmodel ``quantization/config.py``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vllm.compressed_linear.integration.config import ConfigError


class DynamicRules:
    """An ordered map from regular expressions over full module names to overrides.

    The first pattern that matches from the name's beginning decides. ``-:`` before a pattern
    leaves the module unquantized; ``+:`` may be left out.
    """

    def __init__(self, rules: Any) -> None:
        """Raises ``ConfigError`` for anything but a map of valid patterns to maps."""
        if not isinstance(rules or {}, dict):
            raise ConfigError(f"dynamic is {rules!r}, expected a map from patterns to overrides")
        self._rules: list[tuple[str, re.Pattern[str], dict[str, Any] | None]] = []
        for pattern, override in (rules or {}).items():
            excluded = pattern.startswith("-:")
            bare = pattern[2:] if pattern[:2] in ("-:", "+:") else pattern
            if not excluded and not isinstance(override or {}, dict):
                raise ConfigError(f"dynamic pattern {pattern!r}: {override!r} is no map")
            try:
                compiled = re.compile(bare)
            except re.error as error:
                raise ConfigError(f"dynamic pattern {pattern!r}: {error}") from None
            self._rules.append((pattern, compiled, None if excluded else dict(override or {})))

    def find(self, names: Sequence[str]) -> tuple[str, dict[str, Any] | None]:
        """(pattern, overrides) of the first rule that matches one of a module's ``names``.

        Overrides are None when it excludes the module; ("", {}) when no rule matches.
        """
        for pattern, compiled, override in self._rules:
            if any(compiled.match(name) for name in names):
                return pattern, override
        return "", {}
