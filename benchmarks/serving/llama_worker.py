# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as an engine, run by the Python of its own environment.

    python -m benchmarks.serving.llama_worker MODEL.gguf THREADS TOKENS [STREAMS]

Figures come as JSON on stdout; with STREAMS only the milliseconds of a decode step of so many.

It is driven through llama.cpp's own C interface, in this process and without a server: sequences
that are answered together go into one batch for each step, prompts too, and every token is taken
by llama.cpp's greedy sampler. So nothing of Python's stands between two steps but making the batch.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp

from benchmarks.serving.workload import (
    CONTEXT,
    SHORT_PROMPT,
    STREAMS,
    Stream,
    decode_rate,
    measure,
    prompts,
)

BATCH = 2048


class LlamaCpp:
    """``answer`` of llama.cpp with ``threads`` threads."""

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        model.use_mmap = False
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = CONTEXT * max(STREAMS)
        context.n_seq_max = max(STREAMS)
        context.n_batch = BATCH
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp gives no context")
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        chain = llama_cpp.llama_sampler_chain_default_params()
        self.sampler = llama_cpp.llama_sampler_chain_init(chain)
        llama_cpp.llama_sampler_chain_add(self.sampler, llama_cpp.llama_sampler_init_greedy())

    @property
    def vocabulary(self) -> int:
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        return int(llama_cpp.llama_vocab_n_tokens(vocabulary))

    def _add(self, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch, at = self.batch, self.batch.n_tokens
        batch.token[at] = token
        batch.pos[at] = position
        batch.n_seq_id[at] = 1
        batch.seq_id[at][0] = sequence
        batch.logits[at] = wanted
        batch.n_tokens = at + 1

    def _decode(self) -> None:
        if code := llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode gives {code}")

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> Sequence[Stream]:
        """See ``workload.Answer``."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self.batch.n_tokens = 0
        wanted = []
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._add(token, position, sequence, position == len(prompt) - 1)
            wanted.append(self.batch.n_tokens - 1)
        seen: list[list[tuple[float, int]]] = [[] for _ in prompts]
        for step in range(tokens):
            self._decode()
            taken = [
                llama_cpp.llama_sampler_sample(self.sampler, self.context, at) for at in wanted
            ]
            now = time.perf_counter() - start
            self.batch.n_tokens = 0
            for sequence, (prompt, token) in enumerate(zip(prompts, taken, strict=True)):
                seen[sequence].append((now, step + 1))
                self._add(token, len(prompt) + step, sequence, True)
            wanted = list(range(len(prompts)))
        return [Stream(tuple(one)) for one in seen]


def step_ms(engine: LlamaCpp, streams: int, tokens: int) -> float:
    """Milliseconds of a decode step of so many streams, all of it."""
    rates = [
        decode_rate(engine.answer(prompts(streams, SHORT_PROMPT, engine.vocabulary, seed), tokens))
        for seed in range(4)
    ]
    return streams / statistics.median(rates[1:]) * 1e3


def main() -> None:
    path, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing llama.cpp prints is taken for the answer
    started = time.perf_counter()
    engine = LlamaCpp(path, threads)
    start = time.perf_counter() - started
    figures: dict[str, Any] = {"start_s": start}
    if len(sys.argv) > 4:
        figures["step_ms"] = step_ms(engine, int(sys.argv[4]), tokens)
    else:
        figures |= measure(engine.answer, engine.vocabulary, tokens)
    info = ctypes.cast(llama_cpp.llama_print_system_info(), ctypes.c_char_p).value
    figures["system_info"] = (info or b"").decode()
    print(json.dumps(figures), file=answers)


if __name__ == "__main__":
    main()
