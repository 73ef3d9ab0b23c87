# SPDX-License-Identifier: Apache-2.0
"""Counts the calls of an op that is written in Python; native ones count themselves."""

from __future__ import annotations


class CallCounter:
    """How often an op has run in this process. Calls that only trace do not count."""

    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1

    def reset(self) -> None:
        self.count = 0
