# SPDX-License-Identifier: Apache-2.0
"""Tables in comments of C++: rows begin with ``// |``, which ``.clang-format`` keeps as they are
(``make lint`` formats every source; these tests show that it cannot join or break such rows)."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

from tests.support.repository import ROOT

CUDA = ROOT / "csrc" / "cuda"
CLANG_FORMAT = Path(sysconfig.get_path("scripts")) / "clang-format"

WIDE_TABLE = "".join(
    (
        "// Text before the table.\n//\n",
        *(f"// | row {number} | {'words of a cell ' * 8}|\n" for number in range(3)),
        "//\n// Text after the table.\nint x;\n",
    )
)


def formatted(source: str, style: str) -> str:
    done = subprocess.run(
        [CLANG_FORMAT, f"--style={style}"], input=source, capture_output=True, text=True, check=True
    )
    return done.stdout


def rows(path: Path) -> list[str]:
    return re.findall(r"^// \|(.*)$", path.read_text(), re.MULTILINE)


def test_the_formatter_keeps_rows_wider_than_its_limit() -> None:
    style = (ROOT / ".clang-format").read_text()
    assert formatted(WIDE_TABLE, f"file:{ROOT / '.clang-format'}") == WIDE_TABLE
    # Without the setting the same rows are joined: what the setting protects from.
    unguarded = "\n".join(
        line for line in style.splitlines() if not line.startswith(("CommentPragmas", "#"))
    )
    options = ", ".join(unguarded.splitlines())
    assert formatted(WIDE_TABLE, f"{{{options}}}") != WIDE_TABLE


def test_the_page_of_primitives_names_each_of_them() -> None:
    """What kernels may call is defined twice, under nvcc and under g++, and documented once."""

    def defined(*files: str) -> set[str]:
        text = "".join((CUDA / file).read_text() for file in files)
        found = re.findall(r"^CL_DEVICE [\w ]*?(\w+)(?:<\w+>)?\(", text, re.MULTILINE)
        return set(found)

    both = defined("device/small_floats.h") | (
        defined("device/instructions.h") & defined("emulator/primitives.h")
    )
    declarations = [row.split("|")[0] for row in rows(CUDA / "device" / "device.h")]
    documented = set(re.findall(r"(\w+)(?:<\w+>)?\(", " ".join(declarations)))
    assert documented - {"CL_GLOBAL", "kernel"} == both
