# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of bitsandbytes in every variant: divided among ranks, damaged, contradictory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.bitsandbytes_store import BitsAndBytesWeight
from tests.support.changed_checkpoints import changed_copy
from tests.support.damages import untold_damages
from tests.support.messages import saying
from tests.support.model_loading import loaded
from tests.support.shards import (
    MODULE,
    assert_ranks_hold_the_whole,
    described_by,
    load,
    source_of,
    stored_by,
)
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.parts import refine
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.spec.scheme import CheckpointScheme

VARIANTS = {
    "nf4": BitsAndBytesWeight(),
    "nf4-block-32": BitsAndBytesWeight(block=32),
    "nf4-double": BitsAndBytesWeight(double=True),
    "nf4-bf16-storage": BitsAndBytesWeight(storage="bfloat16"),
    "fp4": BitsAndBytesWeight("fp4"),
    "fp4-double": BitsAndBytesWeight("fp4", double=True),
    "int8": BitsAndBytesWeight("int8"),
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_together_hold_the_whole_weight(name: str, axis: str, ranks: int) -> None:
    store = VARIANTS[name]
    assert_ranks_hold_the_whole(store.config, store, axis, ranks, 208, 512)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_damage_of_a_tensor_is_right_or_told(name: str) -> None:
    store = VARIANTS[name]
    values = ("nan", "inf", "-inf", "0.0", "3e+38")
    # Other numbers are other weights; a scale of 0 is that of weights that are all 0.
    others = [f"weight with {value}" for value in values] + ["weight zeros"]
    for tensor in ("weight.absmax", "weight.nested_absmax", "weight.nested_quant_map"):
        others += [f"{tensor} with 0.0", f"{tensor} with 3e+38", f"{tensor} zeros"]
    assert untold_damages(store.config, store, 208, 512, others) == []


def test_the_kind_of_a_file_goes_before_that_of_the_configuration() -> None:
    store = VARIANTS["nf4"]
    assert_ranks_hold_the_whole(
        store.config | {"bnb_4bit_quant_type": "fp4"}, store, "n", 2, 64, 128
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_of_weights_that_are_all_zero_mean_nothing(kind: str) -> None:
    store = BitsAndBytesWeight(kind)
    stored, tensors = stored_by(store, 64, 128)
    tensors[f"{MODULE}.weight.absmax"][:3] = 0
    described = described_by(store.config, tensors)
    restated = dict(described.format.restated(tensors.items()))
    scheme = described.resolve(MODULE)
    assert isinstance(scheme, CheckpointScheme)
    shard = load(source_of(MODULE, scheme, 64, 128), restated)
    (part,) = refine([shard], LayerContext("float32", "float32"))
    found = part.weights.dequantize(0, 64)
    stored.meaning[0], stored.meaning[1, :64] = 0, 0
    assert torch.equal(found, torch.from_numpy(stored.meaning).float())


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("tensor", "change", "complaint"),
    [
        ("quant_map", lambda t: t.flip(0), (f"{Q}.quant_map", "the table of nf4")),
        ("quant_map", None, (f"{Q}.quant_map", "not in the checkpoint")),
        ("nested_absmax", lambda t: t[:-1], (f"{Q}.nested_absmax", [3], [4])),
        ("nested_quant_map", None, (f"{Q}.nested_quant_map", "not in the checkpoint")),
        ("absmax", lambda t: t[:-4], (f"{Q}.absmax", [1020], [1024])),
        ("nested_absmax", lambda t: t * float("nan"), (f"{Q}.nested_absmax", "not finite")),
        ("quant_state.bitsandbytes__nf4", lambda t: t[:-9], ("does not describe a weight",)),
    ],
)
def test_damaged_files_are_one_clear_error(
    tensor: str, change: Any, complaint: tuple[object, ...], tmp_path: Path
) -> None:
    def damaged(tensors: dict[str, torch.Tensor]) -> None:
        held = tensors.pop(f"{Q}.{tensor}")
        if change is not None:
            tensors[f"{Q}.{tensor}"] = change(held)

    path = changed_copy("bnb-nf4-double", tmp_path, damaged)
    with pytest.raises(CheckpointError, match=saying(*complaint)), loaded(path):
        pass
