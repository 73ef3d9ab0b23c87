# SPDX-License-Identifier: Apache-2.0
"""Asks a server with OpenAI's API, as a client does: streaming, over HTTP on loopback."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence

import aiohttp

from benchmarks.serving.workload import Stream


class Client:
    """``answer`` of a server at ``url``, which serves ``model``."""

    def __init__(self, url: str, model: str) -> None:
        self.url = f"{url}/completions"
        self.model = model

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> Sequence[Stream]:
        """See ``workload.Answer``."""
        return asyncio.run(self._answer(prompts, tokens))

    async def _answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> Sequence[Stream]:
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            start = time.perf_counter()
            return await asyncio.gather(
                *(self._stream(session, prompt, tokens, start) for prompt in prompts)
            )

    async def _stream(
        self, session: aiohttp.ClientSession, prompt: Sequence[int], tokens: int, start: float
    ) -> Stream:
        request = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        seen: list[tuple[float, int]] = []
        async with session.post(self.url, json=request) as response:
            if response.status != 200:
                raise RuntimeError(f"{self.url} said {response.status}: {await response.text()}")
            async for line in response.content:
                data = line.decode().strip().removeprefix("data: ")
                if not data or data == "[DONE]":
                    continue
                count = json.loads(data)["usage"]["completion_tokens"]
                if count and (not seen or count > seen[-1][1]):
                    seen.append((time.perf_counter() - start, count))
        if not seen or seen[-1][1] != tokens:
            raise RuntimeError(
                f"{len(seen)} answers, the last {seen[-1:]}, expected {tokens} tokens"
            )
        return Stream(tuple(seen))
