# SPDX-License-Identifier: Apache-2.0
"""One rank of a pipeline, or of a tensor-parallel group: loads models one after another and says
what came of it.

Run as ``python -m tests.support.completeness_worker KIND RANK SIZE PORT DIRECTORY…``; KIND is
``pipeline`` or ``tensor``. Prints a JSON list of {"error": text, "warnings": list}, one for each
directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.support.model_loading import engine_args, init_distributed
from vllm.compressed_linear.integration import completeness
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN


def main(kind: str, rank: int, size: int, port: int, paths: list[str]) -> None:
    torch.accelerator.empty_cache = lambda: None
    init_distributed(rank, size, port, pipeline=kind == "pipeline")
    print(json.dumps([_loaded(path) for path in paths]))


def _loaded(path: str) -> dict[str, Any]:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = engine_args(Path(path), "float32", skip_tokenizer_init=True).create_engine_config()
    PROCESS_PLAN.reset()
    warnings: list[str] = []
    error = ""
    with (
        set_current_vllm_config(config),
        mock.patch.object(
            completeness.logger, "warning", lambda text, *args: warnings.append(text % args)
        ),
    ):
        try:
            get_model(vllm_config=config)
        except ValueError as found:
            error = str(found)
    return {"error": error, "warnings": warnings}


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5:])
