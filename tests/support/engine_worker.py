# SPDX-License-Identifier: Apache-2.0
"""One ``LLM()`` in a process of its own.

Run as ``python -m tests.support.engine_worker OUT MODEL OPTIONS``. OPTIONS is JSON for ``LLM``.
Writes to OUT what the prompts of the model's reference give: log probabilities, greedy tokens, the
plan, and which ops ran how often while generating.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from safetensors.torch import load_file

from vllm import LLM, SamplingParams
from vllm.compressed_linear.backends import reference as reference_backend
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.machine import native

DEFAULTS: dict[str, object] = {
    "max_model_len": 128,
    "max_logprobs": 512,
    # On a CPU this is the share of memory that must be free at the start.
    "gpu_memory_utilization": 0.3,
}


def main(out: Path, model: Path, options: dict[str, object]) -> None:
    llm = LLM(str(model), **(DEFAULTS | options))
    reference = load_file(model / "reference" / "reference.safetensors")
    prompts = [{"prompt_token_ids": row} for row in reference["input_ids"].tolist()]
    native.reset_call_counts()
    reference_backend.CALLS.reset()
    scored = llm.generate(
        prompts,
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=512),
        use_tqdm=False,
    )
    counts = {"native": native.call_counts(), "reference": reference_backend.CALLS.count}
    log_probabilities = torch.full(reference["logits"].shape, float("nan"))
    for row, output in enumerate(scored):
        for position, found in enumerate(output.prompt_logprobs[1:]):
            for token, entry in found.items():
                log_probabilities[row, position, token] = entry.logprob
    # The same prompts again: from the prefix cache, in chunks where the options ask for them.
    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    first = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy, use_tqdm=False)]
    again = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy, use_tqdm=False)]
    torch.save(
        {
            "log_probabilities": log_probabilities[:, :-1],
            "tokens": [list(tokens) for tokens in first],
            "tokens_again": [list(tokens) for tokens in again],
            "counts": counts,
            "plan": json.loads(json.dumps(PROCESS_PLAN.to_json())),
        },
        out,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
