# SPDX-License-Identifier: Apache-2.0
"""Small models in the variants of compressed-tensors, layer by layer against definitions in
numpy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.compressed_tensors_store import CompressedWeight
from tests.support.damages import untold_damages
from tests.support.described import Described
from tests.support.float_models import (
    SMALL,
    FloatModel,
    assert_every_layer_computes,
    layers_of,
    some_input,
    write,
)
from tests.support.messages import saying
from tests.support.model_loading import loaded
from tests.support.shards import assert_ranks_hold_the_whole, source_of
from tests.support.synthetic import Model
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration.linear import CompressedLinearMethod
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.spec.scheme import CheckpointScheme

PACKED = CompressedWeight(4, "pack-quantized")


@dataclass(frozen=True)
class Variant:
    store: CompressedWeight
    shape: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "tensor-token": Variant(CompressedWeight(strategy="tensor", x="token")),
    "channel-static-bias": Variant(CompressedWeight(x="static"), {"bias": True}),
    "channel-static-asymmetric": Variant(
        CompressedWeight(x="static-asymmetric", scale_dtype=torch.bfloat16), {"bias": True}
    ),
    "group-token-asymmetric": Variant(CompressedWeight(strategy="group", x="token-asymmetric")),
    "ragged-blocks": Variant(
        CompressedWeight(strategy="block", x="token"),
        {"hidden": 96, "heads": 3, "kv_heads": 1, "intermediate": 200},
    ),
    "4-bit-in-int8": Variant(CompressedWeight(4, strategy="group", x="token")),
    "4-bit-packed-with-int8-inputs": Variant(replace(PACKED, strategy="group", x="token")),
    "4-bit-packed-with-fp8-inputs": Variant(replace(PACKED, strategy="group", x="fp8")),
    "tied": Variant(CompressedWeight(x="token"), model={"tied": True}),
    "head": Variant(CompressedWeight(x="token"), {"vocab": 501}, {"head": True}),
    "nvfp4": Variant(CompressedWeight(4, "nvfp4-pack-quantized", "tensor_group", 16, x="nvfp4")),
    "nvfp4-a16": Variant(CompressedWeight(4, "nvfp4-pack-quantized", "tensor_group", 16)),
    "mxfp4": Variant(CompressedWeight(4, "mxfp4-pack-quantized", "group", 32, x="mxfp4")),
    "mxfp4-fp8-inputs": Variant(CompressedWeight(4, "mxfp4-pack-quantized", "group", 32, x="fp8")),
    "plain-members": Variant(CompressedWeight(x="token", plain=("v_proj", "up_proj"))),
    "outputs": Variant(replace(PACKED, x="static", y=True), {"bias": True}),
    "outputs-2-bit": Variant(CompressedWeight(2, "pack-quantized", x="static", y=True)),
    "outputs-8-bit": Variant(CompressedWeight(8, x="static", y=True)),
    "outputs-only": Variant(replace(PACKED, y=True)),
    "outputs-uncalibrated": Variant(replace(PACKED, x="static", y=True, uncalibrated=("x", "y"))),
    "rotated": Variant(replace(PACKED, strategy="group", rotation=64), {"bias": True}),
    "rotated-plain-members": Variant(
        replace(PACKED, strategy="group", rotation=32, plain=("v_proj", "down_proj"))
    ),
    "rotated-static-outputs": Variant(replace(PACKED, x="static", y=True, rotation=128)),
    "inputs-uncalibrated": Variant(replace(PACKED, x="static", y=True, uncalibrated=("x",))),
}


def model_of(variant: Variant) -> FloatModel:
    shape = Model(**(SMALL | variant.shape))
    return FloatModel(variant.store.config, variant.store, shape, **variant.model)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_computes_what_its_file_means(name: str, tmp_path: Path) -> None:
    """On a kernel of ours; members of fused layers keep their own static and global scales."""
    variant = VARIANTS[name]
    found = write(model_of(variant), tmp_path)
    with loaded(tmp_path) as model:
        assert_every_layer_computes(model, found.stored)
        entries = list(PROCESS_PLAN.entries.values())
    assert {entry.backend for entry in entries} <= {"cpu", "cpu_int8"}
    if variant.store.y and not variant.store.uncalibrated:
        told = [entry for entry in entries if "y is quantized" in entry.note]
        assert {entry.name.rpartition(".")[2] for entry in told} >= {"o_proj", "down_proj"}
        assert all("y as int8 static" in entry.descriptor for entry in told)


def test_outputs_of_bf16_layers_are_multiples_of_the_scale(tmp_path: Path) -> None:
    store = replace(PACKED, x="static", y=True)
    found = write(model_of(Variant(store)), tmp_path)
    with loaded(tmp_path, "bfloat16") as model:
        for _, layer, members in layers_of(model, found.stored):
            if len(members) > 1:
                continue
            x = some_input(members[0].meaning.shape[1]).bfloat16()
            y = layer.quant_method.apply(layer, x, getattr(layer, "bias", None)).float()
            codes = y / members[0].step
            assert float((codes - codes.round()).abs().max()) <= 127 * 2.0**-8
            assert float(codes.abs().max()) <= 128 * (1 + 2.0**-8)


@pytest.mark.parametrize("name", ["outputs", "rotated-static-outputs"])
def test_layers_with_steps_around_the_product_are_one_graph(name: str, tmp_path: Path) -> None:
    found = write(model_of(VARIANTS[name]), tmp_path)
    with loaded(tmp_path) as model:
        _, layer, members = next(layers_of(model, found.stored))
        assert len(members) == 3
        bias = layer.bias

        def call(x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = layer.quant_method.apply(layer, x, bias)
            return y

        x = some_input(members[0].meaning.shape[1])
        torch.compiler.reset()
        traced = torch.compile(call, fullgraph=True, backend="eager")
        assert torch.equal(traced(x), call(x))


K = "model.layers.0.self_attn.k_proj"
DAMAGES = {
    "no input scale": ("channel-static-bias", "input_scale", None, ("not in the checkpoint",)),
    "no output scale": ("outputs", "output_scale", None, ("not in the checkpoint",)),
    "no global scale": ("nvfp4", "weight_global_scale", None, ("not in the checkpoint",)),
    "no scale": ("tensor-token", "weight_scale", None, ("not in the checkpoint",)),
    "input scale of zero": ("channel-static-bias", "input_scale", 0.0, ("other than 0",)),
    "output scale of NaN": ("outputs", "output_scale", float("nan"), ("finite",)),
    "global scale of zero": ("nvfp4", "weight_global_scale", 0.0, ("finite",)),
    "infinite input global scale": ("nvfp4", "input_global_scale", 0.0, ("finite",)),
    "scale of NaN": ("ragged-blocks", "weight_scale", float("nan"), ("finite",)),
    "infinite scale": ("4-bit-in-int8", "weight_scale", float("inf"), ("finite",)),
    "scale of zero": ("tensor-token", "weight_scale", 0.0, ("scale 0",)),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files_are_one_clear_error(what: str, tmp_path: Path) -> None:
    name, tensor, value, complaint = DAMAGES[what]
    write(model_of(VARIANTS[name]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if value is None:
        del tensors[f"{K}.{tensor}"]
    else:
        tensors[f"{K}.{tensor}"].view(-1)[0] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with (
        pytest.raises(ValueError, match=saying("qkv_proj", f"{K}.{tensor}", *complaint)),
        loaded(tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("tensor", "change", "complaint"),
    [
        ("weight", lambda t: t[:-8], ([56, 128],)),
        ("weight", lambda t: t.to(torch.int32), ("int32", "int8")),
        ("weight_scale", lambda t: t.repeat(1, 3), ([64, 3],)),
        ("weight_scale", lambda t: t[:-1], ([63, 1],)),
        ("weight_scale", lambda t: t.to(torch.int32), ("int32",)),
        ("input_scale", lambda t: t.repeat(2), ([2], [1])),
    ],
)
def test_other_shapes_and_dtypes_are_one_clear_error(
    tensor: str, change: Any, complaint: tuple[object, ...], tmp_path: Path
) -> None:
    write(model_of(VARIANTS["channel-static-bias"]), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{K}.{tensor}"] = change(tensors[f"{K}.{tensor}"]).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=saying(f"{K}.{tensor}", *complaint)), loaded(tmp_path):
        pass


@pytest.mark.parametrize("name", VARIANTS)
def test_every_damage_of_a_tensor_is_right_or_told(name: str) -> None:
    store = VARIANTS[name].store
    harmless = ["weight_global_scale with 3e+38"]  # a divisor
    assert untold_damages(store.config, store, 208, 384, harmless) == []


def test_a_mixture_as_in_googles_mobile_checkpoints(tmp_path: Path) -> None:
    """2-bit head, 4-bit attention and 8-bit feed-forward layers between static inputs and
    outputs; the configuration is where early releases had it."""
    attention = replace(PACKED, x="static", y=True)
    wide = CompressedWeight(x="static", y=True)
    head = CompressedWeight(2, "pack-quantized")
    named = {"embeddings": head, "llm": attention, "gates": wide}
    targets = {
        "embeddings": ["re:.*lm_head$"],
        "llm": [r"re:.*self_attn\..*_proj$"],
        "gates": [r"re:.*mlp\..*"],
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            name: {**store.config_group, "targets": targets[name]} for name, store in named.items()
        },
        "ignore": [],
    }

    def store(module: str, *rest: Any) -> Any:
        kind = "embeddings" if module == "lm_head" else "llm" if "attn" in module else "gates"
        return named[kind](module, *rest)

    found = write(FloatModel(config, store, Model(**(SMALL | {"vocab": 501})), head=True), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["compression_config"] = described.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(described))
    with loaded(tmp_path) as model:
        checked = assert_every_layer_computes(model, found.stored)
        assert "lm_head" in checked
        assert {e.backend for e in PROCESS_PLAN.entries.values()} <= {"cpu", "cpu_int8"}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if not v.store.rotation])
def test_ranks_together_hold_the_whole_weight(name: str, axis: str, ranks: int) -> None:
    """Of every kind of scales, also where a border is inside of a block or group; rotations whose
    blocks would be cut are refused."""
    store = VARIANTS[name].store
    assert_ranks_hold_the_whole(store.config, store, axis, ranks, 208, 320)


@pytest.mark.parametrize("name", ["outputs", "rotated"])
def test_what_needs_all_channels_is_refused_where_ranks_divide_them(name: str) -> None:
    store = replace(VARIANTS[name].store, rotation=128 if name == "rotated" else 0)
    scheme = Described.of(store.config).resolve("a.down_proj")
    assert isinstance(scheme, CheckpointScheme)
    method = CompressedLinearMethod.__new__(CompressedLinearMethod)
    method.prefix = "a.down_proj"
    method.sources = [source_of("a.down_proj", scheme, 96, 128, {"k_start": 0, "k": 64})]
    with pytest.raises(ConfigError, match=saying("a.down_proj", "--tensor-parallel-size 1")):
        method._check_sums_over_ranks(64)
    if name == "rotated":
        method._check_sums_over_ranks(128)
