# SPDX-License-Identifier: Apache-2.0
"""One rank of a tensor-parallel group: loads models one after another and saves their logits.

Run as ``python -m tests.support.tensor_parallel_worker RANK SIZE PORT JOBS``, JOBS a JSON file:
list of {"model": directory, "input_ids": list, "out": file, "environment": [2 maps]}, and
optionally "reload": a directory whose weights rank 1 finds damaged, and "record": modules whose
inputs each rank saves, too (``inputs_file``).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.support.defined_models import record_inputs
from tests.support.model_loading import LoadedModel, init_distributed, loaded, logits
from tests.support.reloading import reload
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.prepare import layer
from vllm.compressed_linear.prepare.self_check import SelfCheckError


def _refused(rank: int, model: LoadedModel, path: str) -> str:
    """What this rank says of a reload in which rank 1 finds a layer damaged."""
    check = layer.self_check

    def damaged(name: str, *args: Any) -> None:
        if rank == 1 and name.endswith("down_proj"):
            raise SelfCheckError(f"{name}: seen on rank 1 only")
        check(name, *args)

    with mock.patch.object(layer, "self_check", damaged):
        try:
            reload(model, Path(path))
        except ValueError as error:
            return str(error)
    return "accepted"


def inputs_file(out: str, rank: int) -> str:
    return f"{out}.inputs{rank}"


def main(rank: int, size: int, port: int, jobs: Path) -> None:
    init_distributed(rank, size, port)
    for job in json.loads(jobs.read_text()):
        # One rank may be told to choose otherwise, as two unlike machines would.
        environment = mock.patch.dict(os.environ, job["environment"][rank])
        options = {"tensor_parallel_size": size, "skip_tokenizer_init": True}
        with environment, loaded(Path(job["model"]), **options) as model:
            told = _refused(rank, model, job["reload"]) if "reload" in job else ""
            recorded = record_inputs(model, set(job.get("record", ())))
            result = logits(model, torch.tensor(job["input_ids"]), gathered_on_rank_0=True)
        if "record" in job:
            torch.save(recorded(), inputs_file(job["out"], rank))
        if rank == 0:
            assert result is not None
            plan = [entry.descriptor for entry in PROCESS_PLAN.entries.values()]
            cache = [entry.cache for entry in PROCESS_PLAN.entries.values()]
            saved = {"logits": result, "plan": plan, "cache": cache, "told": told}
            torch.save(saved, job["out"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
