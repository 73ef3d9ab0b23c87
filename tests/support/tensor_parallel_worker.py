# SPDX-License-Identifier: Apache-2.0
"""One rank of a tensor-parallel group: loads models one after another and saves their logits.

Run as ``python -m tests.support.tensor_parallel_worker RANK SIZE PORT JOBS``, JOBS a JSON file:
list of {"model": directory, "input_ids": list, "out": file, "environment": [2 maps]}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

from tests.support.model_loading import init_distributed, loaded, logits
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN


def main(rank: int, size: int, port: int, jobs: Path) -> None:
    init_distributed(rank, size, port)
    for job in json.loads(jobs.read_text()):
        # One rank may be told to choose otherwise, as two unlike machines would.
        environment = mock.patch.dict(os.environ, job["environment"][rank])
        options = {"tensor_parallel_size": size, "skip_tokenizer_init": True}
        with environment, loaded(Path(job["model"]), **options) as model:
            result = logits(model, torch.tensor(job["input_ids"]), gathered_on_rank_0=True)
        if rank == 0:
            assert result is not None
            plan = [entry.descriptor for entry in PROCESS_PLAN.entries.values()]
            cache = [entry.cache for entry in PROCESS_PLAN.entries.values()]
            torch.save({"logits": result, "plan": plan, "cache": cache}, job["out"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
