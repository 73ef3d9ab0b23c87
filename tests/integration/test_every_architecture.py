# SPDX-License-Identifier: Apache-2.0
"""Every architecture that vLLM builds from its default configuration is also built with ours.

On the meta device, so full size costs nothing; ``test_architectures`` loads weights.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.header_checkpoints import default_configs
from tests.support.model_loading import engine_args, init_distributed
from vllm.compressed_linear.integration.config import NAME
from vllm.compressed_linear.integration.delegation import RefusedByVllmError
from vllm.compressed_linear.integration.embedding import CompressedUnquantizedEmbeddingMethod
from vllm.compressed_linear.integration.linear import (
    CompressedLinearMethod,
    CompressedUnquantizedLinearMethod,
)

OURS = (
    CompressedLinearMethod,
    CompressedUnquantizedEmbeddingMethod,
    CompressedUnquantizedLinearMethod,
)
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": -1,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq_v2",
}
ALL_ARCHITECTURES_AT_LEAST = 60
"""A run that could build fewer has something amiss."""
WITHOUT_QUANTIZATION = ("MambaForCausalLM", "FalconMambaForCausalLM")
"""vLLM builds these without asking any quantization config."""


def build(path: Path, config: dict[str, Any], **options: Any) -> torch.nn.Module:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    (path / "config.json").write_text(json.dumps(config))
    vllm_config = engine_args(
        path, "bfloat16", skip_tokenizer_init=True, max_model_len=None, **options
    ).create_engine_config()
    with (
        set_current_vllm_config(vllm_config),
        torch.device("meta"),
        set_default_torch_dtype(torch.bfloat16),
    ):
        return initialize_model(vllm_config=vllm_config)


def has_our_methods(model: torch.nn.Module) -> bool:
    return any(isinstance(getattr(m, "quant_method", None), OURS) for m in model.modules())


@pytest.mark.slow
@pytest.mark.usefixtures("inspect_in_process")
def test_every_architecture_is_built_with_our_config(tmp_path: Path) -> None:
    init_distributed()
    built, failures = 0, []
    for architecture, config in default_configs().items():
        try:
            build(tmp_path, config)
        except Exception:  # vLLM itself cannot, here or from these defaults
            continue
        built += 1
        for name, changes, options in (
            ("unquantized", {}, {"quantization": NAME}),
            ("gptq", {"quantization_config": GPTQ}, {}),
        ):
            try:
                model = build(tmp_path, config | changes, **options)
                if has_our_methods(model) == (architecture in WITHOUT_QUANTIZATION):
                    failures.append(
                        f"{architecture} {name}: some layers are ours, or none, against expectation"
                    )
            except RefusedByVllmError:
                continue  # quantized experts, of which vLLM says that it cannot run them here
            except Exception as error:
                failures.append(f"{architecture} {name}: {type(error).__name__}: {error}")
        gc.collect()
    assert not failures, "\n".join(failures)
    assert built >= ALL_ARCHITECTURES_AT_LEAST
