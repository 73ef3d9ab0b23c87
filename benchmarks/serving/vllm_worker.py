# SPDX-License-Identifier: Apache-2.0
"""vLLM without a server: scheduler, worker and model in this process, with one thread.

    python -m benchmarks.serving.vllm_worker MODEL TOKENS QUANTIZATION    figures as JSON on stdout

This is how llama.cpp is driven too: nothing stands between two steps but the engine itself.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.serving.workload import CONTEXT, STREAMS, Stream, measure


class VllmInProcess:
    """``answer`` of an engine in this process; the variables that make it one must be set before
    vLLM is imported."""

    def __init__(self, model: str, quantization: str | None) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        torch.set_num_threads(1)  # what vLLM's server gives its worker on a machine of two cores
        from vllm import LLM

        llm = LLM(
            model,
            quantization=quantization,
            max_model_len=CONTEXT,
            max_num_seqs=max(STREAMS),
            enable_prefix_caching=False,
            distributed_executor_backend="uni",
        )
        if torch.get_num_threads() != 1:
            raise RuntimeError(f"vLLM runs with {torch.get_num_threads()} threads, expected 1")
        self.engine: Any = llm.llm_engine
        self.vocabulary: int = llm.model_config.get_vocab_size()
        self.numbers = itertools.count()

    def add(self, prompt: Sequence[int], tokens: int) -> str:
        """A request for so many tokens, greedily; its id."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        request = str(next(self.numbers))
        self.engine.add_request(request, {"prompt_token_ids": list(prompt)}, params)
        return request

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> Sequence[Stream]:
        """See ``workload.Answer``."""
        start = time.perf_counter()
        seen: dict[str, list[tuple[float, int]]] = {self.add(p, tokens): [] for p in prompts}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                count = len(output.outputs[0].token_ids)
                seen[output.request_id].append((time.perf_counter() - start, count))
        if short := [stream for stream in seen.values() if stream[-1][1] != tokens]:
            raise RuntimeError(f"{len(short)} answers are not of {tokens} tokens")
        return [Stream(tuple(stream)) for stream in seen.values()]


def main() -> None:
    model, tokens, quantization = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing vLLM prints is taken for the answer
    engine = VllmInProcess(model, quantization)
    print(json.dumps(measure(engine.answer, engine.vocabulary, tokens)), file=answers, flush=True)


if __name__ == "__main__":
    main()
