# SPDX-License-Identifier: Apache-2.0
"""Values packed bit by bit, with nothing of the package."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def words(values: torch.Tensor, bits: int, planes: Sequence[int] = ()) -> torch.Tensor:
    """Values [rows, n] as a little-endian stream of bits along n, int32 [rows, n·bits / 32]; with
    ``planes``, those of each 32 values one after the other."""
    rows = []
    for row in values.tolist():
        stream = total = 0
        for begin in range(0, len(row), 32):
            below = 0
            for width in planes or (bits,):
                for value in row[begin : begin + 32]:
                    stream |= (value >> below & ((1 << width) - 1)) << total
                    total += width
                below += width
        rows.append([stream >> at & 0xFFFFFFFF for at in range(0, total, 32)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)
