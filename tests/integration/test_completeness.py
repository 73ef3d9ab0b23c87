# SPDX-License-Identifier: Apache-2.0
"""After loading, every parameter has values from the checkpoint, or loading fails by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.architectures import FAMILIES, WITHOUT_LOGITS, write
from tests.support.drafters import Eagle3, loaded_with_drafter, write_clock, write_eagle3
from tests.support.edited import edited
from tests.support.messages import saying, says
from tests.support.model_loading import loaded
from tests.support.stock_vllm import fp32_options
from tests.support.synthetic import Quant
from tests.support.table_models import Bits, TableModel
from tests.support.written_families import CheckpointOf, written_once
from vllm.compressed_linear import settings
from vllm.compressed_linear.checkpoint.completeness import IncompleteCheckpointError
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.integration import completeness
from vllm.compressed_linear.integration.config import NAME

pytestmark = pytest.mark.usefixtures("inspect_in_process")

LAYER = "model.layers.0"
OPTED_IN = {"quantization": NAME}
FAMILY = {
    "dense": FAMILIES["qwen2-qkv-bias"],
    "norms": FAMILIES["qwen3-qk-norm"],
    "experts": FAMILIES["mixtral"],
    "tied": FAMILIES["gemma-tied"],
    "buffers": FAMILIES["gemma4"],
}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> CheckpointOf:
    return written_once(FAMILY, tmp_path_factory)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings about completeness, as they appear in vLLM's log."""
    lines: list[str] = []
    monkeypatch.setattr(
        completeness.logger, "warning", lambda text, *args: lines.append(text % args)
    )
    return lines


def load(path: Path, **options: Any) -> None:
    with loaded(path, skip_tokenizer_init=True, **options):
        pass


@pytest.mark.parametrize(
    ("family", "form", "options"),
    [
        ("dense", "gptq", {}),
        ("dense", "ct", {}),
        ("dense", "", OPTED_IN),
        ("norms", "gptq", {}),
        ("experts", "gptq", {}),
        ("experts", "", OPTED_IN),
        ("tied", "gptq", {}),
        ("buffers", "gptq", {}),
        ("tied", "", OPTED_IN),
    ],
)
def test_complete_checkpoints_load_without_a_warning(
    family: str,
    form: str,
    options: dict[str, Any],
    checkpoint_of: CheckpointOf,
    warnings: list[str],
) -> None:
    load(checkpoint_of(family, form), **options)
    assert warnings == []


QKV = f"{LAYER}.self_attn.qkv_proj"
EXPERTS = f"{LAYER}.block_sparse_moe.experts"


@pytest.mark.parametrize(
    ("family", "form", "dropped", "said"),
    [
        ("dense", "gptq", ["model.norm.weight"], ["model.norm.weight (float32 [128])"]),
        ("dense", "ct", ["lm_head.weight"], ["lm_head.weight (float32 [512, 128])"]),
        ("dense", "gptq", ["model.embed_tokens.weight"], ["model.embed_tokens.weight"]),
        ("norms", "gptq", [f"{LAYER}.self_attn.q_norm.weight"], [f"{LAYER}.self_attn.q_norm"]),
        (
            "dense",
            "gptq",
            [f"{LAYER}.self_attn.k_proj.bias"],
            [f"{QKV}.bias (float32 [256], rows 128 to 191", f"{LAYER}.self_attn.k_proj.bias"],
        ),
        (
            "dense",
            "",
            [f"{LAYER}.self_attn.v_proj.weight"],
            [f"{QKV}.weight", "rows 192 to 255", f"{LAYER}.self_attn.v_proj.weight"],
        ),
        (
            "dense",
            "",
            [f"{LAYER}.mlp.gate_proj.weight"],
            [f"{LAYER}.mlp.gate_up_proj.weight", "rows 0 to 255", f"{LAYER}.mlp.gate_proj.weight"],
        ),
        ("dense", "", [f"{LAYER}.mlp.down_proj.weight"], [f"{LAYER}.mlp.down_proj.weight"]),
        (
            "experts",
            "gptq",
            [f"{EXPERTS}.2.w1.weight"],
            [f"{EXPERTS}.routed_experts.w13_weight", f"expected {EXPERTS}.2.w1.weight"],
        ),
        (
            "experts",
            "",
            [f"{EXPERTS}.3.w2.weight"],
            [f"{EXPERTS}.routed_experts.w2_weight", "row 3", f"expected {EXPERTS}.3.w2.weight"],
        ),
        ("tied", "gptq", ["model.embed_tokens.weight"], ["model.embed_tokens.weight"]),
        # A factor of each layer, for which vLLM's class has a buffer.
        ("buffers", "gptq", [f"{LAYER}.layer_scalar"], [f"{LAYER}.layer_scalar"]),
    ],
)
def test_a_parameter_that_nothing_filled_is_an_error_by_name(
    family: str,
    form: str,
    dropped: Collection[str],
    said: Collection[str],
    checkpoint_of: CheckpointOf,
    tmp_path: Path,
) -> None:
    path = edited(checkpoint_of(family, form), tmp_path / "incomplete", drop=dropped)
    expected = saying(path, *said, f"{settings.ALLOW_MISSING}=1")
    with pytest.raises(IncompleteCheckpointError, match=expected):
        load(path, **({} if form else OPTED_IN))


@pytest.mark.parametrize("by", ["variable", "config"])
def test_one_setting_turns_the_error_into_a_warning(
    by: str,
    checkpoint_of: CheckpointOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
) -> None:
    options: dict[str, Any] = {}
    if by == "variable":
        monkeypatch.setenv(settings.ALLOW_MISSING, "1")
    else:
        options["additional_config"] = {"compressed_linear": {"allow_missing": True}}
    path = edited(checkpoint_of("dense", "gptq"), tmp_path / "edited", drop=["model.norm.weight"])
    load(path, **options)
    (line,) = warnings
    assert says(line, "model.norm.weight", settings.ALLOW_MISSING)


@pytest.mark.parametrize(
    ("add", "said"),
    [
        ({f"{LAYER}.act.scales": torch.ones(2)}, ["1 tensor", f"{LAYER}.act.scales"]),
        ({"another.module.weight": torch.ones(2)}, ["1 tensor", "another.module.weight"]),
        ({f"{LAYER}.mlp.down_proj.bias": torch.ones(128)}, [f"{LAYER}.mlp.down_proj.bias"]),
        (
            {f"model.layers.{i}.self_attn.o_proj.bias": torch.ones(128) for i in range(2)},
            ["2 tensors", f"{LAYER}.self_attn.o_proj.bias and 1 like it"],
        ),
        # Biases without effect, and what vLLM leaves out of any checkpoint.
        ({f"{LAYER}.mlp.down_proj.bias": torch.zeros(128)}, None),
        ({f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.ones(16)}, None),
    ],
)
def test_a_tensor_that_nothing_took_is_said_once(
    add: Mapping[str, torch.Tensor],
    said: Collection[str] | None,
    checkpoint_of: CheckpointOf,
    tmp_path: Path,
    warnings: list[str],
) -> None:
    load(edited(checkpoint_of("dense", "gptq"), tmp_path / "edited", add=add))
    assert len(warnings) == (0 if said is None else 1)
    assert said is None or says(warnings[0], *said)


@pytest.mark.parametrize("form", ["gptq", ""])
def test_a_model_for_adapters_is_checked_too(
    form: str, checkpoint_of: CheckpointOf, tmp_path: Path, warnings: list[str]
) -> None:
    options = {"enable_lora": True, **({} if form else OPTED_IN)}
    load(checkpoint_of("dense", form), **options)
    assert warnings == []
    dropped = f"{LAYER}.self_attn.k_proj.bias"
    path = edited(checkpoint_of("dense", form), tmp_path / "incomplete", drop=[dropped])
    with pytest.raises(IncompleteCheckpointError, match=saying(path, f"expected {dropped}")):
        load(path, **options)


def test_an_entry_that_matched_nothing_is_said_once(
    checkpoint_of: CheckpointOf, warnings: list[str]
) -> None:
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq_v2",
        "dynamic": {"-:.*no_such_module$": {}, "-:.*lm_head$": {}},
    }
    load(checkpoint_of("dense", "gptq"), hf_overrides={"quantization_config": config})
    (line,) = warnings
    assert says(line, "1 entry", "dynamic", "-:.*no_such_module$")


def test_dummy_weights_are_not_checked(
    checkpoint_of: CheckpointOf, tmp_path: Path, warnings: list[str]
) -> None:
    path = edited(checkpoint_of("dense", "gptq"), tmp_path / "edited", drop=["model.norm.weight"])
    load(path, load_format="dummy")
    assert warnings == []


def test_a_tensor_that_vllms_loader_refuses_is_named(
    checkpoint_of: CheckpointOf, tmp_path: Path
) -> None:
    norm = {"model.norm.weight": torch.ones(96)}
    path = edited(checkpoint_of("dense", "gptq"), tmp_path / "edited", add=norm)
    with pytest.raises(CheckpointError, match=saying(path, "model.norm.weight", "float32 [96]")):
        load(path)


def test_models_without_a_config_of_ours_are_left_alone(
    checkpoint_of: CheckpointOf, tmp_path: Path, warnings: list[str]
) -> None:
    added = {f"{LAYER}.mlp.down_proj.bias": torch.ones(128)}
    load(edited(checkpoint_of("dense", ""), tmp_path / "edited", add=added))
    assert warnings == []


def test_experts_of_a_mixture_with_shared_ones_and_latent_attention(
    tmp_path: Path, warnings: list[str]
) -> None:
    """A layer of vLLM that makes its own matrices from a linear of ours."""
    name = "deepseek3-latent-attention"
    path = write(WITHOUT_LOGITS[name], Quant("gptq"), tmp_path, reference=False).quantized
    load(path, **fp32_options(name))
    assert warnings == []
    missing = ["model.layers.1.mlp.gate.e_score_correction_bias"]
    with pytest.raises(IncompleteCheckpointError, match=saying(*missing)):
        load(edited(path, tmp_path / "edited", drop=missing), **fp32_options(name))


@pytest.mark.parametrize("own_head", [True, False])
def test_drafters_are_checked_against_their_own_files(
    own_head: bool, tmp_path: Path, warnings: list[str]
) -> None:
    """A head or table that the target shares is not missing; any other parameter is."""
    write_clock(tmp_path / "target", TableModel("llama", tied=False, table=None, head=Bits(8)))
    write_eagle3(tmp_path / "drafter", Eagle3(own_head=own_head))
    speculative = {"method": "eagle3", "model": "", "num_speculative_tokens": 1}
    complete = speculative | {"model": str(tmp_path / "drafter")}
    with loaded_with_drafter(tmp_path / "target", complete):
        pass
    assert warnings == []
    edited(tmp_path / "drafter", tmp_path / "edited", drop=["norm.weight"])
    incomplete = speculative | {"model": str(tmp_path / "edited")}
    with (
        pytest.raises(IncompleteCheckpointError, match=saying(tmp_path / "edited", "norm.weight")),
        loaded_with_drafter(tmp_path / "target", incomplete),
    ):
        pass
