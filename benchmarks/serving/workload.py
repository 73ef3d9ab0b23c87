# SPDX-License-Identifier: Apache-2.0
"""What every engine is asked to do, and the figures that are made of its answers.

Imported by worker processes of other environments: the standard library only.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PREFILL_TOKENS = 512
SHORT_PROMPT = 32
OUTPUT_TOKENS = 128
STREAMS = (1, 4, 16)
CONTEXT = 1024
"""Tokens that a sequence may have at most."""


@dataclass(frozen=True)
class Stream:
    """One answered request: seconds since the start at which it had so many tokens."""

    tokens: tuple[tuple[float, int], ...]

    @property
    def first(self) -> float:
        return self.tokens[0][0]

    @property
    def last(self) -> float:
        return self.tokens[-1][0]

    def count_at(self, seconds: float) -> float:
        """Tokens there were at a time, taken as arriving evenly between two reports."""
        before = self.tokens[0]
        for now in self.tokens:
            if now[0] >= seconds:
                gap = now[0] - before[0]
                part = (seconds - before[0]) / gap if gap else 1.0
                return before[1] + part * (now[1] - before[1])
            before = now
        return float(before[1])


Answer = Callable[[Sequence[Sequence[int]], int], Sequence[Stream]]
"""Answers prompts of token ids at the same time, each with exactly so many tokens, greedily."""


def prompts(count: int, tokens: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random ids, so that no two prompts share a prefix; the lowest ids are left to control."""
    draw = random.Random(seed)
    return [[draw.randrange(1000, vocabulary) for _ in range(tokens)] for _ in range(count)]


def decode_rate(streams: Sequence[Stream]) -> float:
    """Tokens per second of all streams together, while all of them decode."""
    start, end = max(s.first for s in streams), min(s.last for s in streams)
    if end <= start:
        raise ValueError("no time in which all streams decoded: one ended before another began")
    return sum(s.count_at(end) - s.count_at(start) for s in streams) / (end - start)


def measure(answer: Answer, vocabulary: int, tokens: int = OUTPUT_TOKENS) -> dict[str, Any]:
    """All figures of one engine; decoding is that of ``tokens`` for each prompt.

    Seeds differ, so nothing is answered from a prefix cache.
    """

    def ask(count: int, prompt: int, output: int, seed: int) -> Sequence[Stream]:
        return answer(prompts(count, prompt, vocabulary, seed), output)

    ask(1, SHORT_PROMPT, 16, 1)  # what is done once, at the first request
    ask(1, PREFILL_TOKENS, 1, 2)
    prefill = [ask(1, PREFILL_TOKENS, 1, 10 + i)[0].first for i in range(3)]
    first = [ask(1, SHORT_PROMPT, 1, 20 + i)[0].first for i in range(5)]
    decode = {}
    for streams in STREAMS:
        rates = [
            decode_rate(ask(streams, SHORT_PROMPT, tokens, 100 * streams + i))
            for i in range(3 if streams == 1 else 1)
        ]
        decode[str(streams)] = statistics.median(rates)
    return {
        "prefill_tokens_per_s": PREFILL_TOKENS / statistics.median(prefill),
        "first_token_s": statistics.median(first),
        "decode_tokens_per_s": decode,
    }
