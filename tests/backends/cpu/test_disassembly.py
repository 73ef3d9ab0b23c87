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


@pytest.mark.parametrize("groups", ["whole", "half"])
@pytest.mark.parametrize(
    ("codes", "bits", "decoding", "digits"),
    [
        ("QuadCodes<4>", 4, 3, [3]),  # of one row of 64 bytes: two masks and a shift
        ("QuadCodes<8>", 8, 2, [3]),  # a permutation and a sign
        ("TableCodes<true>", 4, 3, [3, 2]),  # two permutations and a shift
        ("TableCodes<false>", 4, 5, [3, 2]),  # two masks and shuffles, and a shift
    ],
)
def test_the_loop_of_digits_loads_rows_once_and_spills_nothing(
    codes: str, bits: int, decoding: int, digits: list[int], groups: str
) -> None:
    """A block of four tiles, 8 quads in each, for each number of ``digits``. The sums of both
    halves of blocks leave no register for one of the constants."""
    kind = f"compressed_linear::cpu::(anonymous namespace)::{codes}"
    whole = "true" if groups == "whole" else "false"
    code = instructions(f"DigitsKernel<{kind}, 1, 4, {whole}>::run(")
    count = Counter(line.split()[0] for line in code)
    assert count["vpdpbusd"] == 4 * 8 * sum(digits)
    rows = [line for line in code if re.match(r"vmovdqu(64|8)\s+-?\w*\(%r(?!sp)[^)]*\),%zmm", line)]
    assert len(rows) == len(digits) * 4 * bits
    names = ("vpandd", "vpandq", "vpsrlw", "vpermw", "vpermb", "vpshufb", "vpxord", "vpxorq")
    least = len(digits) * 4 * bits * decoding
    # Further ones begin and end a segment.
    assert least <= sum(count[name] for name in names) <= least + 32
    spilled = [line for line in code if "zmm" in line and re.search(r"\(%r[sb]p", line)]
    assert len(spilled) <= (0 if groups == "whole" else 2)
