# SPDX-License-Identifier: Apache-2.0
"""Logits of checkpoints as vLLM computes them without this package.

Run as ``VLLM_COMPRESSED_LINEAR=0 python -m tests.support.stock_worker OUT DTYPE CHECKPOINT...``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.model_loading import loaded, logits


def main(out: Path, dtype: str, paths: list[Path]) -> None:
    # vLLM's 4-bit operator multiplies with AMX and does not ask the kernel for it; in a server
    # oneDNN has asked before.
    torch.cpu._init_amx()
    found: dict[str, torch.Tensor | str] = {}
    for path in paths:
        input_ids = load_file(path / "reference" / "reference.safetensors")["input_ids"]
        try:
            with loaded(path, dtype) as model:
                assert model.config.model_config.quantization != "compressed_linear"
                found[path.name] = logits(model, input_ids)
        except Exception as error:
            found[path.name] = f"{type(error).__name__}: {error}"
    torch.save(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [Path(argument) for argument in sys.argv[3:]])
