# SPDX-License-Identifier: Apache-2.0
"""Small models as AutoRound exports floats, layer by layer against definitions in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.compressed_tensors_store import CompressedWeight
from tests.support.damages import change_tensor, untold_damages
from tests.support.float8_store import Float8
from tests.support.float_models import (
    SMALL,
    FloatModel,
    Store,
    assert_every_layer_computes,
    write,
)
from tests.support.format_configs import auto_round
from tests.support.messages import saying
from tests.support.model_loading import loaded
from tests.support.shards import assert_ranks_hold_the_whole
from tests.support.synthetic import Model
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

PACKING = {"packing_format": "auto_round:llm_compressor"}
MX = {"data_type": "mx_fp", "group_size": 32, "act_data_type": "mx_fp", "act_group_size": 32}
FP8 = {"bits": 8, "data_type": "fp", "packing_format": "auto_round:fp8"}
NVFP4 = {"bits": 4, "data_type": "nv_fp", "group_size": 16}
STATIC_GS = {"act_bits": 4, "act_data_type": "nv_fp4_with_static_gs", "act_group_size": 16}

VARIANTS: dict[str, tuple[dict[str, Any], Store]] = {
    "mxfp4": (
        {"bits": 4, "act_bits": 4, **MX, **PACKING},
        CompressedWeight(4, "mxfp4-pack-quantized", "group", 32, x="mxfp4"),
    ),
    "mxfp4-a16": (
        {"bits": 4, **MX},
        CompressedWeight(4, "mxfp4-pack-quantized", "group", 32),
    ),
    "mxfp8": (
        {"bits": 8, "act_bits": 8, **MX, **PACKING},
        Float8((1, 32), scale_dtype=torch.uint8, x="ue8m0"),
    ),
    "nvfp4": (
        {**NVFP4, **STATIC_GS, **PACKING},
        CompressedWeight(4, "nvfp4-pack-quantized", "tensor_group", 16, x="nvfp4"),
    ),
    "nvfp4-a16": (
        {**NVFP4, **PACKING},
        CompressedWeight(4, "nvfp4-pack-quantized", "tensor_group", 16),
    ),
    "fp8-static": (
        {**FP8, "group_size": 0, "act_bits": 8, "act_group_size": 0, "act_dynamic": False},
        Float8(x="static"),
    ),
    "fp8-channel-static": (
        {**FP8, "group_size": -1, "act_bits": 8, "act_group_size": 0, "act_dynamic": False},
        Float8(shape="N", x="static"),
    ),
    "fp8-channel-dynamic": (
        {**FP8, "group_size": -1, "act_bits": 8, "act_group_size": -1},
        Float8(shape="N1", x="token"),
    ),
    "fp8-blocks": (
        {**FP8, "group_size": [128, 128], "act_bits": 8, "act_group_size": 128},
        Float8((128, 128), scale="weight_scale_inv", x="group"),
    ),
    "int8": (
        {"bits": 8, "data_type": "int", "group_size": -1, "act_bits": 8, "sym": True, **PACKING},
        CompressedWeight(x="token"),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_computes_what_its_file_means(name: str, tmp_path: Path) -> None:
    settings, store = VARIANTS[name]
    found = write(FloatModel(auto_round(**settings), store, Model(**SMALL)), tmp_path)
    with loaded(tmp_path) as model:
        assert_every_layer_computes(model, found.stored)
        assert {e.backend for e in PROCESS_PLAN.entries.values()} <= {"cpu", "cpu_int8"}


def test_negative_scales(tmp_path: Path) -> None:
    """About half of AutoRound's scales are."""
    settings, _ = VARIANTS["int8"]

    def store(module: str, *rest: Any) -> Any:
        stored = CompressedWeight(x="token")(module, *rest)
        assert stored is not None
        signs = torch.where(torch.arange(len(stored.tensors["weight_scale"])) % 2 == 0, -1.0, 1.0)
        stored.tensors["weight_scale"] *= signs.unsqueeze(1)
        stored.meaning[:] *= signs.double().unsqueeze(1).numpy()
        return stored

    found = write(FloatModel(auto_round(**settings), store, Model(**SMALL)), tmp_path)
    with loaded(tmp_path) as model:
        assert_every_layer_computes(model, found.stored)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_together_hold_the_whole_weight(name: str, axis: str, ranks: int) -> None:
    settings, store = VARIANTS[name]
    assert_ranks_hold_the_whole(auto_round(**settings), store, axis, ranks, 208, 320)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_damage_of_a_tensor_is_right_or_told(name: str) -> None:
    settings, store = VARIANTS[name]
    harmless = ["weight_global_scale with 3e+38"]  # a divisor
    assert untold_damages(auto_round(**settings), store, 208, 384, harmless) == []


K = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "change", "complaint"),
    [
        ("mxfp4", "weight_scale", None, ("not in the checkpoint",)),
        ("mxfp4", "weight_scale", lambda t: t[:, :-1], ([64, 3], [64, 4])),
        ("mxfp8", "weight_scale", lambda t: t * 0 + 255, ("finite", "nan")),
        ("nvfp4", "weight_global_scale", None, ("not in the checkpoint",)),
        ("nvfp4", "weight_scale", lambda t: t[:, ::2], ([64, 4], [64, 8])),
        ("nvfp4", "input_global_scale", lambda t: t * 0, ("finite",)),
        ("nvfp4-a16", "weight_packed", lambda t: t.to(torch.int32), ("int32", "uint8")),
        ("fp8-static", "input_scale", None, ("not in the checkpoint",)),
        ("fp8-channel-static", "weight_scale", lambda t: t[:-1], ([63],)),
        ("fp8-blocks", "weight_scale_inv", lambda t: t * float("nan"), ("finite", "nan")),
        ("int8", "weight", lambda t: t[:-8], ([56, 128],)),
    ],
)
def test_damaged_files_are_one_clear_error(
    name: str, tensor: str, change: Any, complaint: tuple[object, ...], tmp_path: Path
) -> None:
    settings, store = VARIANTS[name]
    write(FloatModel(auto_round(**settings), store, Model(**SMALL)), tmp_path)
    change_tensor(tmp_path, f"{K}.{tensor}", change)
    with pytest.raises(ValueError, match=saying(f"{K}.{tensor}", *complaint)), loaded(tmp_path):
        pass
