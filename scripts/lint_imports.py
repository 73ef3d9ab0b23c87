# SPDX-License-Identifier: Apache-2.0
"""Checks the layers of the package with import-linter: lint_imports.py TOOLS [ROOT].

TOOLS is the directory with import-linter (`pip install --target`), ROOT the tree that is checked.
Nothing else is on the path: with site-packages there, `vllm.compressed_linear` would be looked for
in the installed vLLM, whose import takes seconds and whose package is not ours to check. So this is
run by `python -I -S`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def main(tools: str, root: str = str(REPOSITORY)) -> int:
    """The exit status of import-linter: 0 when all contracts are kept."""
    os.chdir(root)  # which import-linter puts first on the path
    sys.path[:0] = [root, str(REPOSITORY / "scripts"), tools]
    from importlinter.cli import lint_imports

    return lint_imports(config_filename=str(REPOSITORY / ".importlinter"), no_cache=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
