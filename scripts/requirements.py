# SPDX-License-Identifier: Apache-2.0
"""Prints the project's requirements and those of the extras named on the command line.

`pip install -e .[test]` would also bring back what `make setup` takes out on purpose, since pip
completes whatever an extra names; so the environment is made from these lists and the project is
installed with --no-deps.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The requirement strings of `pyproject` and of `extras`; KeyError for an unknown extra."""
    project = tomllib.loads(pyproject.read_text())["project"]
    found = list(project["dependencies"])
    for extra in extras:
        found += project["optional-dependencies"][extra]
    return found


if __name__ == "__main__":
    print("\n".join(requirements(Path(__file__).parent.parent / "pyproject.toml", sys.argv[1:])))
