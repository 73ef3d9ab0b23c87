# SPDX-License-Identifier: Apache-2.0
"""Counter of the calls of an op that is written in Python; native ops have their own."""

from __future__ import annotations


class CallCounter:
    """Number of calls of an op in this process, without calls that only trace."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1

    def reset(self) -> None:
        self.count = 0
