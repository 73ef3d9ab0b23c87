# SPDX-License-Identifier: Apache-2.0
"""Instructions of the loops for one token, from the compiled library."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

import pytest

from vllm.compressed_linear.machine import native

TOOLS = ("nm", "c++filt", "objdump")

pytestmark = [
    pytest.mark.skipif(native.available() is not None, reason=str(native.available())),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="no binutils"),
]


def output(*command: str, text: str | None = None) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def instructions(function: str) -> list[str]:
    """Of the function whose demangled name contains ``function``; skips where there is none."""
    library = str(native.LIBRARY)
    symbols = [line.split()[-1] for line in output("nm", library).splitlines()]
    names = output("c++filt", text="\n".join(symbols)).splitlines()
    found = [s for s, name in zip(symbols, names, strict=True) if function in name]
    if not found:
        pytest.skip(f"this build has no {function}")
    text = output("objdump", "-d", "--no-show-raw-insn", f"--disassemble={found[0]}", library)
    return [line.split("\t", 1)[1] for line in text.splitlines() if re.match(r"\s+\w+:\t", line)]


@pytest.mark.parametrize(("bits", "decoding"), [(4, 48), (8, 64)])
def test_the_loop_of_digits_loads_rows_once_and_spills_nothing(bits: int, decoding: int) -> None:
    """A block of four tiles: 8 quads by 3 digits in each, and what one row of 64 bytes takes, two
    quads of 4 bits (two masks and a shift) or one of 8 (a permutation and a sign)."""
    code = instructions(f"DigitsKernel<{bits}, 1, 4>::run(")
    count = Counter(line.split()[0] for line in code)
    assert count["vpdpbusd"] == 4 * 8 * 3
    rows = [line for line in code if re.match(r"vmovdqu64\s+-?\w*\(%r\w+\),%zmm", line)]
    assert len(rows) == 4 * bits
    decoders = ("vpandd", "vpandq", "vpsrlw", "vpermw", "vpxord", "vpxorq")
    # Further ones begin and end a segment.
    assert decoding <= sum(count[name] for name in decoders) <= decoding + 16
    assert not [line for line in code if "zmm" in line and re.search(r"\(%r[sb]p", line)]
