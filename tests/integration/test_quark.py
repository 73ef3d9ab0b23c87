# SPDX-License-Identifier: Apache-2.0
"""Small models in the variants of AMD Quark, layer by layer against definitions in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.damages import change_tensor, untold_damages
from tests.support.float_models import (
    SMALL,
    FloatModel,
    assert_every_layer_computes,
    write,
)
from tests.support.messages import saying
from tests.support.model_loading import loaded
from tests.support.quark_store import QuarkWeight
from tests.support.shards import assert_ranks_hold_the_whole
from tests.support.synthetic import Model
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

VARIANTS = {
    "int8-static": QuarkWeight("int8", x="static"),
    "int8-channel-dynamic": QuarkWeight("int8", channel=True, x="token"),
    "int8-groups": QuarkWeight("int8-groups"),
    "uint8-groups": QuarkWeight("uint8-groups"),
    "fp8-static": QuarkWeight("fp8", x="static"),
    "fp8-channel-dynamic": QuarkWeight("fp8", channel=True, x="token"),
    "int4-groups": QuarkWeight("int4"),
    "int4-groups-in-order": QuarkWeight("int4", pack_method="order"),
    "int4-channel": QuarkWeight("int4", channel=True),
    "uint4-groups": QuarkWeight("uint4"),
    "uint4-groups-in-order": QuarkWeight("uint4", pack_method="order"),
    "int4-fp8": QuarkWeight("int4-fp8", x="token"),
    "int4-fp8-static": QuarkWeight("int4-fp8", x="static"),
    "mxfp4": QuarkWeight("mxfp4", x="own"),
    "mxfp4-a16": QuarkWeight("mxfp4"),
    "mxfp4-fp8": QuarkWeight("mxfp4", x="token"),
    "mxfp6": QuarkWeight("mxfp6", x="own"),
    "nvfp4": QuarkWeight("nvfp4", x="own"),
}


def model_of(name: str, **shape: Any) -> FloatModel:
    store = VARIANTS[name]
    return FloatModel(store.config, store, Model(**(SMALL | shape)))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_computes_what_its_file_means(name: str, tmp_path: Path) -> None:
    found = write(model_of(name, bias=True), tmp_path)
    with loaded(tmp_path) as model:
        assert_every_layer_computes(model, found.stored)
        assert {e.backend for e in PROCESS_PLAN.entries.values()} <= {"cpu", "cpu_int8"}


def test_mixed_layers_by_name(tmp_path: Path) -> None:
    """The first pattern decides; the others have the global configuration."""
    fp8, int8 = VARIANTS["fp8-channel-dynamic"], VARIANTS["int8-static"]
    config = int8.config
    config["layer_quant_config"] = {
        "*.v_proj": fp8.config["global_quant_config"],
        "model.layers.1.mlp.down_proj": fp8.config["global_quant_config"],
    }

    def store(module: str, *rest: Any) -> Any:
        named = module.endswith("v_proj") or module == "model.layers.1.mlp.down_proj"
        return (fp8 if named else int8)(module, *rest)

    found = write(FloatModel(config, store, Model(**SMALL)), tmp_path)
    with loaded(tmp_path) as model:
        assert_every_layer_computes(model, found.stored)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_together_hold_the_whole_weight(name: str, axis: str, ranks: int) -> None:
    """Slices that cut groups, and words of eight output channels."""
    store = VARIANTS[name]
    assert_ranks_hold_the_whole(store.config, store, axis, ranks, 208, 320)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_damage_of_a_tensor_is_right_or_told(name: str) -> None:
    store = VARIANTS[name]
    assert untold_damages(store.config, store, 208, 384) == []


K = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "change", "complaint"),
    [
        ("int8-static", "input_scale", None, ("not in the checkpoint",)),
        ("int8-static", "input_scale", lambda t: t * 0, ("other than 0",)),
        ("int8-static", "weight_scale", lambda t: t * float("nan"), ("finite",)),
        ("int8-static", "weight", lambda t: t[:-8], ([56, 128],)),
        ("uint4-groups", "weight_scale", lambda t: t[:-1], ([3, 64],)),
        ("uint4-groups", "weight_zero_point", None, ("not in the checkpoint",)),
        ("int4-fp8", "weight_scale", None, ("not in the checkpoint",)),
        ("mxfp6", "weight", lambda t: t[:, :-3], ([64, 93],)),
        ("nvfp4", "weight_scale_2", lambda t: t * float("inf"), ("finite",)),
    ],
)
def test_damaged_files_are_one_clear_error(
    name: str, tensor: str, change: Any, complaint: tuple[object, ...], tmp_path: Path
) -> None:
    write(model_of(name), tmp_path)
    change_tensor(tmp_path, f"{K}.{tensor}", change)
    with pytest.raises(ValueError, match=saying(f"{K}.{tensor}", *complaint)), loaded(tmp_path):
        pass
