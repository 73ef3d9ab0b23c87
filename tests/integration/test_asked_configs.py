# SPDX-License-Identifier: Apache-2.0
"""Where vLLM asks a quantization config for its class, its name or a field: all such places of the
supported releases are known, each with why ours may give another answer than vLLM's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import vllm
from tests.support.asked_configs import unknown_places
from vllm.compressed_linear.formats.registry import format_of, why_not_read
from vllm.compressed_linear.integration.config import CompressedLinearConfig


def test_every_place_where_vllm_asks_a_config_is_known() -> None:
    assert unknown_places(Path(str(vllm.__file__)).parent) == []


@pytest.mark.parametrize("model_type", ["mimo_v2", "mimo_v2_flash", "llama"])
def test_a_fused_weight_that_the_model_cuts_itself_is_left_to_vllm(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MiMo-V2's class puts the rows of q, k and v in order for vLLM's own parameters."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    prefix = "model.layers.0.self_attn.qkv_proj"
    codes = torch.zeros(256, 128, dtype=torch.float8_e4m3fn)
    tensors = {f"{prefix}.weight": codes, f"{prefix}.weight_scale_inv": torch.ones(2, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = CompressedLinearConfig.from_config(
        {"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    config.maybe_update_config(str(tmp_path), SimpleNamespace(model_type=model_type))
    left: list[str] = []
    monkeypatch.setattr(config, "_delegate", lambda layer, name, reason: left.append(reason))
    layer = QKVParallelLinear.__new__(QKVParallelLinear)
    torch.nn.Module.__init__(layer)
    config.get_quant_method(layer, prefix)
    assert left == ["the model's class cuts its fused weight itself"] * (model_type != "llama")


def test_experts_that_only_vllms_own_config_describes_leave_all_to_vllm() -> None:
    """Ling's class renames their scales, and sets a field of ``Fp8Config``."""
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert format_of(config) is not None
    config["routed_experts_quant_method"] = "mxfp4"
    assert format_of(config) is None
    assert "routed_experts_quant_method" in why_not_read(config)
