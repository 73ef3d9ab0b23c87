# SPDX-License-Identifier: Apache-2.0
"""One ``LLM()`` with a drafter, in a process of its own.

Run as ``python -m tests.support.drafting_worker OUT MODEL OPTIONS``. OPTIONS is JSON for ``LLM``,
with ``prompts`` and the number of ``tokens`` to generate. Writes JSON to OUT: greedy tokens, counts
of drafted and accepted tokens, and the plan.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

DEFAULTS: dict[str, Any] = {
    "max_model_len": 128,
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
    # On a CPU this is the share of memory that must be free at the start.
    "gpu_memory_utilization": 0.3,
}


def main(out: Path, model: str, options: dict[str, Any]) -> None:
    prompts = [{"prompt_token_ids": row} for row in options.pop("prompts")]
    greedy = SamplingParams(
        max_tokens=options.pop("tokens"), temperature=0, ignore_eos=True, detokenize=False
    )
    llm = LLM(model, **(DEFAULTS | options))
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    counters = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "drafted": counters["vllm:spec_decode_num_draft_tokens"],
        "accepted": counters["vllm:spec_decode_num_accepted_tokens"],
        "plan": PROCESS_PLAN.to_json(),
    }
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
