# SPDX-License-Identifier: Apache-2.0
"""Where this repository is, and how other processes find it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def environment(**changes: str) -> dict[str, str]:
    """The environment of this process for another one, which finds ``tests.support`` as well."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)} | changes
