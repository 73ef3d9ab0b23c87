# SPDX-License-Identifier: Apache-2.0
"""Settings of the user: environment variables and vLLM's ``--additional-config``.

| environment variable | additional_config["compressed_linear"] | meaning |
|---|---|---|
| VLLM_COMPRESSED_LINEAR=0 | – | do not register at all: vLLM as if this package were absent |
| VLLM_COMPRESSED_LINEAR_BACKEND | "backend" | backend to use, see ``BackendRules`` |
| VLLM_COMPRESSED_LINEAR_STRICT=1 | "strict" | refuse the slow reference backend |
| VLLM_COMPRESSED_LINEAR_PLAN_FILE | "plan_file" | write the plan there as JSON after loading |
| VLLM_COMPRESSED_LINEAR_TUNE_FILE | "tune_file" | choose by these measurements; ``off``: by none |
| VLLM_COMPRESSED_LINEAR_CACHE | "cache" | directory that keeps prepared weights, for fast starts |
| VLLM_COMPRESSED_LINEAR_ALLOW_MISSING=1 | "allow_missing" | load models with missing tensors |

If both are given, the environment variable has precedence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ENABLE = "VLLM_COMPRESSED_LINEAR"
BACKEND = "VLLM_COMPRESSED_LINEAR_BACKEND"
STRICT = "VLLM_COMPRESSED_LINEAR_STRICT"
PLAN_FILE = "VLLM_COMPRESSED_LINEAR_PLAN_FILE"
TUNE_FILE = "VLLM_COMPRESSED_LINEAR_TUNE_FILE"
CACHE = "VLLM_COMPRESSED_LINEAR_CACHE"
ALLOW_MISSING = "VLLM_COMPRESSED_LINEAR_ALLOW_MISSING"
CPU_ISA = "VLLM_COMPRESSED_LINEAR_CPU_ISA"
CPU_PROFILE = "VLLM_COMPRESSED_LINEAR_CPU_PROFILE"
ANY_VLLM = "VLLM_COMPRESSED_LINEAR_ANY_VLLM"
VARIABLES = (
    ENABLE,
    BACKEND,
    STRICT,
    PLAN_FILE,
    TUNE_FILE,
    CACHE,
    ALLOW_MISSING,
    CPU_ISA,
    CPU_PROFILE,
    ANY_VLLM,
)
"""Every environment variable of its own that this package reads."""
BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
"""vLLM's: 1 if the bits of a row must not depend on the other rows of the batch."""
ADDITIONAL_CONFIG_KEY = "compressed_linear"

_KEYS = ("allow_missing", "backend", "cache", "plan_file", "strict", "tune_file")

UNQUANTIZED_PATTERN = "unquantized"


@dataclass(frozen=True)
class BackendRules:
    """``NAME`` for every quantized layer, or comma-separated ``PATTERN=NAME``; first match wins.

    PATTERN is a glob over layer names (``*.down_proj=reference``), or ``unquantized`` for the
    layers whose weights the checkpoint leaves as they are.
    """

    rules: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> BackendRules:
        """``ValueError`` on an empty pattern or name."""
        rules = []
        for entry in filter(None, (part.strip() for part in text.split(","))):
            pattern, equals, name = (part.strip() for part in entry.rpartition("="))
            if not name or (equals and not pattern):
                raise ValueError(f"{BACKEND}: {entry!r} is neither NAME nor PATTERN=NAME")
            rules.append((pattern or "*", name))
        return cls(tuple(rules))

    def backend_for(self, layer: str, *, quantized: bool) -> str | None:
        """The backend that the user requested for ``layer``, or None."""
        for pattern, name in self.rules:
            if pattern == UNQUANTIZED_PATTERN:
                if not quantized:
                    return name
            elif pattern == "*":
                if quantized:
                    return name
            elif fnmatchcase(layer, pattern):
                return name
        return None


def default_tune_file() -> Path:
    """Default path of the tune file, for ``vllm-compressed-linear tune`` and for serving."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vllm-compressed-linear" / "tune.json"


def rates_path() -> Path | None:
    """File next to the tune file that ``VLLM_COMPRESSED_LINEAR_TUNE_FILE`` names, or the default
    one, in which the rates of this machine are kept; None with ``off``. One for the whole process,
    so ``additional_config`` has no part in it."""
    file = _tune_file(os.environ.get(TUNE_FILE) or "")
    return Path(file).with_name("rates.json") if file else None


@dataclass(frozen=True)
class Settings:
    """All settings, read once for each model. ``tune_file``: empty for none. ``allow_missing``:
    parameters that the checkpoint does not fill are a warning instead of an error."""

    backend: BackendRules = BackendRules()
    strict: bool = False
    plan_file: str = ""
    tune_file: str = ""
    cache: str = ""
    allow_missing: bool = False

    @classmethod
    def read(cls, additional_config: Mapping[str, Any] | None = None) -> Settings:
        """Read environment and ``additional_config``. Raises ``ValueError`` for unknown keys."""
        given = dict((additional_config or {}).get(ADDITIONAL_CONFIG_KEY) or {})
        unknown = set(given) - set(_KEYS)
        if unknown:
            raise ValueError(
                f"additional_config[{ADDITIONAL_CONFIG_KEY!r}] has unknown keys "
                f"{sorted(unknown)} (known: {', '.join(_KEYS)})"
            )
        return cls(
            BackendRules.parse(os.environ.get(BACKEND) or given.get("backend") or ""),
            _flag(STRICT, bool(given.get("strict", False))),
            os.environ.get(PLAN_FILE) or given.get("plan_file") or "",
            _tune_file(os.environ.get(TUNE_FILE) or given.get("tune_file") or ""),
            os.environ.get(CACHE) or given.get("cache") or "",
            _flag(ALLOW_MISSING, bool(given.get("allow_missing", False))),
        )


def _tune_file(given: str) -> str:
    return "" if given == "off" else given or str(default_tune_file())


def batch_invariant() -> bool:
    """Whether the user asked vLLM for results that do not depend on the batch."""
    return os.environ.get(BATCH_INVARIANT, "0").strip() not in ("", "0")


def enabled() -> bool:
    """Whether the plugin should register (``VLLM_COMPRESSED_LINEAR`` is not 0)."""
    return _flag(ENABLE, True)


def _flag(variable: str, default: bool) -> bool:
    text = os.environ.get(variable, "").strip().lower()
    if not text:
        return default
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{variable} is {text!r}, expected 1 or 0")
