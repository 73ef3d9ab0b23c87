# SPDX-License-Identifier: Apache-2.0
"""The config that vLLM sees: which checkpoints it claims, and how it gets to know their files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.model_executor.models.utils import WeightsMapper

from tests.support.messages import saying
from vllm.compressed_linear.formats.gptq import Gptq
from vllm.compressed_linear.formats.resolution import ConfigError, LayerKind, Unquantized
from vllm.compressed_linear.formats.unquantized import UnquantizedModel
from vllm.compressed_linear.integration.config import NAME, CompressedLinearConfig
from vllm.compressed_linear.spec.scheme import CheckpointScheme

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128}
INT8 = {"num_bits": 8, "strategy": "channel"}
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": [r"re:^model\.layers.*"], "weights": INT8}},
}
GPTQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
Q = "model.layers.1.self_attn.q_proj"


def write(directory: Path, *names: str) -> None:
    """A file that holds one small tensor of each of ``names``."""
    save_file(
        {name: torch.zeros(1, dtype=torch.float16) for name in names},
        directory / "model.safetensors",
    )


# Claims.


def test_unknown_methods_are_no_business_of_ours() -> None:
    assert CompressedLinearConfig.override_quantization_method({"quant_method": "x"}, None) is None
    assert CompressedLinearConfig.override_quantization_method({"bits": 4}, None) is None
    with pytest.raises(ConfigError, match=saying("quant_method", "'x'")):
        CompressedLinearConfig.from_config({"quant_method": "x"})


@pytest.mark.parametrize(
    ("config", "asked", "claimed"),
    [
        (GPTQ, None, True),
        (GPTQ, "gptq", True),
        (GPTQ, "gptq_marlin", True),
        (GPTQ, NAME, True),
        (GPTQ, "awq", False),
        ({**GPTQ, "checkpoint_format": "marlin"}, None, True),
        ({**GPTQ, "is_marlin_format": True}, None, True),
        ({**GPTQ, "quant_method": "marlin"}, None, True),
        (AWQ, "awq_marlin", True),
        (AUTO_ROUND, "inc", True),
        (COMPRESSED_TENSORS, "compressed-tensors", True),
    ],
)
def test_claims_checkpoints_whatever_alias_the_user_passed(
    config: dict[str, Any], asked: str | None, claimed: bool
) -> None:
    found = CompressedLinearConfig.override_quantization_method(config, asked)
    assert found == (NAME if claimed else None)


# What the files say.


@pytest.mark.parametrize(
    "config",
    [
        {**GPTQ, "dynamic": {r"^model\.layers\.1\.": {"bits": 8}}},
        {**AUTO_ROUND, "extra_config": {Q: {"bits": 8}}, "block_name_to_quantize": "model.layers"},
        COMPRESSED_TENSORS,
    ],
)
def test_vllms_mappers_rename_rules_and_files(config: dict[str, Any], tmp_path: Path) -> None:
    found = CompressedLinearConfig.from_config(config)
    write(tmp_path, f"{Q}.{found.format.marker_tensors[0]}", f"{Q}.scales")
    found.maybe_update_config(str(tmp_path))
    found.apply_vllm_mapper(WeightsMapper(orig_to_new_substr={"layers.": "model.layers."}))
    found.apply_vllm_mapper(WeightsMapper(orig_to_new_substr={"model.model.": "model."}))
    found.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    mapped = f"language_model.{Q}"
    assert found.file.names_of(mapped) == (mapped, Q)
    resolution = found.resolve(mapped, LayerKind.LINEAR)
    assert isinstance(resolution, CheckpointScheme)
    assert resolution.weight.element.bits == 8


def test_headers_of_a_checkpoint_on_the_hub_settle_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def metadata(model: str, *, revision: str | None = None) -> dict[str, Any]:
        asked.append((model, revision))
        return {f"{Q}.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}

    monkeypatch.setattr("vllm.transformers_utils.config.get_safetensors_params_metadata", metadata)
    config = CompressedLinearConfig.from_config(GPTQ)
    config.maybe_update_config("organisation/model", revision="main")
    assert asked == [("organisation/model", "main")]
    assert isinstance(config.resolve(Q, LayerKind.LINEAR), Unquantized)


def test_a_hub_that_does_not_answer_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def metadata(model: str, **other: Any) -> dict[str, Any]:
        raise OSError("no network")

    monkeypatch.setattr("vllm.transformers_utils.config.get_safetensors_params_metadata", metadata)
    config = CompressedLinearConfig.from_config(GPTQ)
    config.maybe_update_config("organisation/model")
    assert config.file.headers is None


def test_a_format_in_a_file_of_its_own_takes_the_place_of_none(tmp_path: Path) -> None:
    found = CompressedLinearConfig()
    assert found.format == UnquantizedModel({})
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128}))
    write(tmp_path, f"{Q}.qweight")
    found.maybe_update_config(str(tmp_path))
    assert isinstance(found.format, Gptq)
    assert found.file.quantized_on_disk(Q)
    assert found.delegation.vllm_name == Gptq.vllm_name


# Entries that select no module.


def test_entries_that_no_module_matched_are_known_after_resolving() -> None:
    config = CompressedLinearConfig.from_config({**AWQ, "modules_to_not_convert": ["q_", "mlp"]})
    both = [("modules_to_not_convert", "q_"), ("modules_to_not_convert", "mlp")]
    assert config.unmatched_entries() == both
    config.resolve(Q, LayerKind.LINEAR)
    assert config.unmatched_entries() == both[1:]
    assert pickle.loads(pickle.dumps(config)).unmatched_entries() == both[1:]


def test_entries_that_a_module_of_the_files_matches_are_matched(tmp_path: Path) -> None:
    write(tmp_path, f"{Q}.qweight")
    config = CompressedLinearConfig.from_config({**AWQ, "modules_to_not_convert": ["q_", "mlp"]})
    config.maybe_update_config(str(tmp_path))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.unmatched_entries() == [("modules_to_not_convert", "mlp")]


def test_packed_files_of_mistrals_own_format_are_refused(tmp_path: Path) -> None:
    """vLLM permutes the rows of ``wq.weight`` and ``wk.weight`` while it renames them, and of no
    other tensor, so packed queries and keys would be in another order than the model's."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    tensors = [f"layers.0.attention.w{part}.{name}" for part in "qk" for name in GPTQ_TENSORS]
    write(tmp_path, "tok_embeddings.weight", *tensors)
    config = CompressedLinearConfig.from_config(GPTQ)
    config.maybe_update_config(str(tmp_path))
    layer = object.__new__(ColumnParallelLinear)
    with pytest.raises(ConfigError, match=saying("Mistral", "k_proj", "qweight")):
        config.get_quant_method(layer, "model.layers.0.self_attn.k_proj")
