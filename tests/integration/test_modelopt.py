# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of NVIDIA ModelOpt in every variant, against definitions in numpy."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from tests.support.architectures import WITHOUT_LOGITS, layer_outputs
from tests.support.changed_checkpoints import changed_copy
from tests.support.checkpoints import checkpoint_reference
from tests.support.damages import untold_damages
from tests.support.defined_models import assert_computes_its_definition, defined
from tests.support.float8_store import Float8
from tests.support.float_models import (
    SMALL,
    FloatModel,
    Store,
    Stored,
    Twins,
    Written,
    assert_every_layer_computes,
    assert_near,
    write,
    write_family,
)
from tests.support.format_configs import PRODUCER, modelopt
from tests.support.messages import saying, says
from tests.support.model_loading import loaded, logits
from tests.support.modelopt_store import ModelOptWeights
from tests.support.shards import assert_ranks_hold_the_whole
from tests.support.synthetic import Model
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.prepare.plan import DELEGATED

RAGGED = {"hidden": 192, "heads": 6, "kv_heads": 2, "intermediate": 160}
AWQ = ("o_proj", "down_proj")
WITHOUT_INPUTS = {"group_0": {"weights": {"num_bits": 4}, "targets": ["Linear"]}}
WITH_INPUTS = {"group_0": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 4}}}
Tensors = dict[str, torch.Tensor]


def nested(algorithm: str, **more: Any) -> dict[str, Any]:
    """As in hf_quant_config.json."""
    inner = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    return {"producer": PRODUCER, "quantization": inner | more}


@dataclass(frozen=True)
class Of:
    """A ``Store`` with another one for each kind of layer."""

    attention: Store
    mlp: Store

    def __call__(self, module: str, n: int, k: int, generator: torch.Generator) -> Stored | None:
        store = self.mlp if ".mlp." in module else self.attention
        return store(module, n, k, generator)


@dataclass(frozen=True)
class Variant:
    config: dict[str, Any]
    store: Store
    exact: bool = False
    shape: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    separate: bool = False
    """Whether only hf_quant_config.json has the configuration."""


NVFP4 = ModelOptWeights("nvfp4", "nvfp4")
FP8 = Float8(shape="", x="static")
ATTENTION = {
    f"model.layers.0.self_attn.{name}_proj": {"quant_algo": "FP8"} for name in ("q", "k", "v", "o")
}
MLP = {
    f"model.layers.0.mlp.{name}_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    for name in ("gate", "up", "down")
}
MIXED = Of(FP8, ModelOptWeights("nvfp4"))

VARIANTS = {
    "fp8": Variant(modelopt("FP8"), FP8),
    "fp8-separate-file": Variant(nested("FP8"), FP8, separate=True),
    "fp8-without-producer": Variant(
        {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}, FP8, separate=True
    ),
    "fp8-without-method": Variant(
        {"quant_algo": "FP8", "producer": PRODUCER, "ignore": ["lm_head"]}, FP8
    ),
    "fp8-channel": Variant(modelopt("FP8_PER_CHANNEL_PER_TOKEN"), Float8(shape="N", x="token")),
    "fp8-blocks-ragged": Variant(
        modelopt("fp8_pb_wo"), Float8((128, 128), four=True), True, RAGGED | {"intermediate": 200}
    ),
    "mxfp8": Variant(modelopt("MXFP8"), ModelOptWeights("mxfp8", "mxfp8"), shape={"bias": True}),
    "mxfp8-minimax": Variant(
        {"quant_method": "mxfp8", "ignored_layers": ["lm_head"]}, ModelOptWeights("mxfp8", "mxfp8")
    ),
    "nvfp4": Variant(modelopt("NVFP4"), NVFP4, shape={"bias": True}),
    "nvfp4-separate-file": Variant(nested("NVFP4", group_size=16), NVFP4, separate=True),
    "nvfp4-method-fp4": Variant(modelopt("NVFP4") | {"quant_method": "modelopt_fp4"}, NVFP4),
    "nvfp4-rows-cut": Variant(modelopt("NVFP4"), NVFP4, shape=RAGGED),
    "nvfp4-weights-only": Variant(
        modelopt("W4A16_NVFP4"), ModelOptWeights("nvfp4", unused=("input_scale",)), True
    ),
    "nvfp4-groups-without-inputs": Variant(
        modelopt("NVFP4", config_groups=WITHOUT_INPUTS), ModelOptWeights("nvfp4"), True
    ),
    "nvfp4-groups-with-inputs": Variant(modelopt("NVFP4", config_groups=WITH_INPUTS), NVFP4),
    "nvfp4-without-input-scales": Variant(modelopt("NVFP4"), ModelOptWeights("nvfp4"), True),
    "nvfp4-awq": Variant(modelopt("NVFP4_AWQ"), ModelOptWeights("nvfp4", "nvfp4", prescaled=AWQ)),
    "nvfp4-under-fp8": Variant(modelopt("W4A8_NVFP4_FP8"), ModelOptWeights("nvfp4", "fp8")),
    "nvfp4-with-head": Variant(modelopt("NVFP4"), NVFP4, model={"head": True}),
    "nvfp4-plain-though-not-excluded": Variant(
        modelopt("NVFP4", ignore=[]),
        ModelOptWeights("nvfp4", "nvfp4", plain=("v_proj", "down_proj")),
    ),
    "mxfp4": Variant(modelopt("mxfp4"), ModelOptWeights("mxfp4"), True),
    "mxfp4-of-gpt-oss": Variant({"quant_method": "mxfp4"}, ModelOptWeights("mxfp4"), True),
    "mxfp4-with-inputs": Variant(
        modelopt("mxfp4", config_groups=WITH_INPUTS), ModelOptWeights("mxfp4", "mxfp4")
    ),
    "mxfp4-under-fp8": Variant(modelopt("W4A8_MXFP4_FP8"), ModelOptWeights("mxfp4", "fp8")),
    "int4-awq": Variant(
        modelopt("W4A16_AWQ", pre_quant_scale=True), ModelOptWeights("int4", prescaled=AWQ), True
    ),
    "int4-awq-of-another-group": Variant(
        modelopt("W4A16_AWQ"), ModelOptWeights("int4", group=32), True
    ),
    "int4-awq-separate-file": Variant(
        nested("W4A16_AWQ", group_size=64), ModelOptWeights("int4", group=64), True, separate=True
    ),
    "int4-awq-under-fp8": Variant(
        modelopt("W4A8_AWQ"),
        ModelOptWeights("int4", "fp8", prescaled=AWQ, unused=("weight_scale_2",)),
    ),
    "int8": Variant(modelopt("W8A16"), ModelOptWeights("int8"), True),
    "int8-smoothquant": Variant(
        modelopt("W8A8_SQ_PER_CHANNEL"), ModelOptWeights("int8", "int8", prescaled=AWQ)
    ),
    "mixed": Variant(modelopt("MIXED_PRECISION", quantized_layers=ATTENTION | MLP), MIXED),
    "mixed-method": Variant(
        modelopt("MIXED_PRECISION", quantized_layers=ATTENTION | MLP)
        | {"quant_method": "modelopt_mixed"},
        MIXED,
    ),
    "mixed-layers-in-the-separate-file": Variant(modelopt("MIXED_PRECISION"), MIXED),
    "mixed-separate-file": Variant(
        nested("MIXED_PRECISION", quantized_layers=ATTENTION | MLP), MIXED, separate=True
    ),
}


def write_variant(variant: Variant, path: Path) -> Written:
    shape = Model(**SMALL | variant.shape)
    files = write(FloatModel(variant.config, variant.store, shape, **variant.model), path)
    if variant.config.get("quant_algo") == "MIXED_PRECISION":
        side = nested("MIXED_PRECISION", quantized_layers=ATTENTION | MLP)
        (path / "hf_quant_config.json").write_text(json.dumps(side))
    if variant.separate:
        config = json.loads((path / "config.json").read_text())
        found = config.pop("quantization_config")
        (path / "config.json").write_text(json.dumps(config))
        (path / "hf_quant_config.json").write_text(json.dumps(found))
    return files


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_computes_what_its_file_means(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    files = write_variant(variant, tmp_path)
    with loaded(files.path) as model:
        layers = assert_every_layer_computes(model, files.stored)
        if variant.model.get("head"):
            assert_near(logits(model, files.input_ids), files.logits, exact=variant.exact)
        else:
            assert_computes_its_definition(model, files.path, files.input_ids, defined(files))
        entries = list(PROCESS_PLAN.entries.values())
        assert {entry.backend for entry in entries} <= {"cpu", "cpu_int8"}
    assert len(layers) >= 4
    told = [entry.name for entry in entries if says(entry.note, "no input_scale")]
    assert len(told) == (4 if name == "nvfp4-without-input-scales" else 0)


ONE_KIND = [name for name, variant in VARIANTS.items() if not isinstance(variant.store, Of)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("name", ONE_KIND)
def test_ranks_together_hold_the_whole_weight(name: str, axis: str, ranks: int) -> None:
    """Slices that cut groups; the module has a prescale where some of the variant have."""
    variant, store = VARIANTS[name], VARIANTS[name].store
    if getattr(store, "prescaled", ()):
        store = replace(store, prescaled=("x_proj",))
    assert_ranks_hold_the_whole(variant.config, store, axis, ranks, 208, 320)


@pytest.mark.parametrize("name", ONE_KIND)
def test_every_damage_of_a_tensor_is_right_or_told(name: str) -> None:
    variant, store = VARIANTS[name], VARIANTS[name].store
    if getattr(store, "prescaled", ()):
        store = replace(store, prescaled=("x_proj",))
    harmless = ["pre_quant_scale dropped"]
    if getattr(store, "kind", "") == "int4":
        # Where the separate file does not tell the size of groups, the scales do.
        harmless += ["weight_scale twice along 1"]
        harmless += ["weight_scale half of 1"] * (getattr(store, "group", 0) == 32)
    assert untold_damages(variant.config, store, 208, 384, harmless) == []


DOWN = "model.layers.0.mlp.down_proj"
K = "model.layers.0.self_attn.k_proj"


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


DAMAGES: dict[str, tuple[str, Callable[[Tensors], object], tuple[object, ...]]] = {
    "no scales": ("nvfp4", lambda t: t.pop(f"{K}.weight_scale"), (f"{K}.weight_scale",)),
    "no second scale": ("nvfp4", lambda t: t.pop(f"{K}.weight_scale_2"), (f"{K}.weight_scale_2",)),
    "no input scale of one module": (
        "nvfp4",
        lambda t: t.pop(f"{K}.input_scale"),
        (f"{K}.input_scale",),
    ),
    "fewer groups": (
        "nvfp4",
        _set(f"{DOWN}.weight_scale", lambda t: t[:, :-1]),
        (f"{DOWN}.weight_scale", [128, 15], [128, 16]),
    ),
    "scales of other rows": (
        "mxfp8",
        _set(f"{DOWN}.weight_scale", lambda t: t[:-2]),
        (f"{DOWN}.weight_scale", [126, 8], [128, 8]),
    ),
    "fewer codes": (
        "int4-awq",
        _set(f"{DOWN}.weight", lambda t: t[:-1]),
        (f"{DOWN}.weight", [63, 256], [64, 256]),
    ),
    "a prescale that is too short": (
        "int4-awq",
        _set(f"{DOWN}.pre_quant_scale", lambda t: t[:-1]),
        (f"{DOWN}.pre_quant_scale", [255], [256]),
    ),
    "a prescale of zero": (
        "int8-smoothquant",
        _set(f"{DOWN}.pre_quant_scale", lambda t: t * 0),
        (f"{DOWN}.pre_quant_scale", "other than 0"),
    ),
    "a prescale that is empty": (
        "int4-awq",
        _set(f"{DOWN}.pre_quant_scale", lambda t: t[:0]),
        (f"{DOWN}.pre_quant_scale", [0], [256]),
    ),
    "a second scale of zero": (
        "nvfp4",
        _set(f"{K}.weight_scale_2", lambda t: t * 0),
        (f"{K}.weight_scale_2", "scale", 0),
    ),
    "scales of zero": (
        "nvfp4",
        _set(f"{K}.weight_scale", lambda t: (t.float() * 0).to(t.dtype)),
        (f"{K}.weight_scale", "scale", 0),
    ),
    "wide scales": (
        "nvfp4",
        _set(f"{DOWN}.weight_scale", lambda t: t.float()),
        (f"{DOWN}.weight_scale", "float32", "float8_e4m3fn"),
    ),
    "half of the groups": (
        "int4-awq",
        _set(f"{DOWN}.weight_scale", lambda t: t[:, :1]),
        (f"{DOWN}.weight_scale", [128, 1], [128, 2]),
    ),
    "one scale of the blocks": (
        "fp8-blocks-ragged",
        _set(f"{K}.weight_scale", lambda t: t[:, :, :1]),
        (f"{K}.weight_scale",),
    ),
    "a prescale that is not a number": (
        "int4-awq",
        _set(f"{DOWN}.pre_quant_scale", lambda t: t * float("nan")),
        (f"{DOWN}.pre_quant_scale", "nan"),
    ),
    "a second scale that is infinite": (
        "nvfp4",
        _set(f"{K}.weight_scale_2", lambda t: t / 0),
        (f"{K}.weight_scale_2", "inf"),
    ),
    "NaN among the scales": (
        "nvfp4",
        _set(f"{K}.weight_scale", lambda t: (t.float() * float("nan")).to(t.dtype)),
        (f"{K}.weight_scale", "finite", "nan"),
    ),
    "NaN among powers of two": (
        "mxfp4",
        _set(f"{K}.weight_scale", lambda t: t * 0 + 255),
        (f"{K}.weight_scale", "finite", "nan"),
    ),
    "an input scale of zero": (
        "nvfp4",
        _set(f"{K}.input_scale", lambda t: t * 0),
        (f"{K}.input_scale", "other than 0"),
    ),
    "an input scale under which x overflows": (
        "nvfp4",
        _set(f"{K}.input_scale", lambda t: t * 0 + 3e36),
        (f"{K}.input_scale", "finite", "below"),
    ),
    "wide codes": (
        "int8",
        _set(f"{DOWN}.weight", lambda t: t.to(torch.int32)),
        (f"{DOWN}.weight", "int32", "int8"),
    ),
    "wide floats with scales": (
        "nvfp4",
        _set(f"{DOWN}.weight", lambda t: t.to(torch.bfloat16)),
        (f"{DOWN}.weight",),
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files_are_one_clear_error(what: str, tmp_path: Path) -> None:
    name, damage, complaint = DAMAGES[what]
    files = write_variant(VARIANTS[name], tmp_path)
    tensors = load_file(files.path / "model.safetensors")
    damage(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, files.path / "model.safetensors")
    with pytest.raises(ValueError, match=saying(*complaint)) as caught, loaded(files.path):
        pass
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Attention:
    """Routers and experts stay as they are."""

    store: Store

    def __call__(self, module: str, n: int, k: int, generator: torch.Generator) -> Stored | None:
        if ".experts." in module or module.endswith("mlp.gate"):
            return None
        return self.store(module, n, k, generator)


@pytest.mark.usefixtures("inspect_in_process")
@pytest.mark.parametrize(
    ("algorithm", "store"),
    [
        ("NVFP4", NVFP4),
        ("MXFP8", ModelOptWeights("mxfp8", "mxfp8")),
        ("W4A8_AWQ", ModelOptWeights("int4", "fp8", prescaled=("kv_b_proj",), group=32)),
        ("W8A8_SQ_PER_CHANNEL", ModelOptWeights("int8", "int8", prescaled=("kv_b_proj",))),
    ],
)
def test_latent_attention_gets_weights_without_the_rounding_of_x(
    algorithm: str, store: Store, tmp_path: Path
) -> None:
    family = WITHOUT_LOGITS["deepseek3-latent-attention"]
    twins = write_family(family, modelopt(algorithm), Attention(store), tmp_path)
    ideal = load_file(twins.ideal / "model.safetensors")
    for module, stored in twins.stored.items():
        if (factor := stored.tensors.get("pre_quant_scale")) is not None:
            ideal[f"{module}.weight"] = ideal[f"{module}.weight"] * factor.float()
    save_file(ideal, twins.ideal / "model.safetensors", {"format": "pt"})
    ours, expected = (layer_outputs(path) for path in (twins.quantized, twins.ideal))
    derived = [key for key in expected if key.endswith(("W_UV", "W_UK_T"))]
    assert len(derived) == 4
    for key in derived:
        error = (ours[key] - expected[key]).abs().max() / expected[key].abs().max()
        assert float(error) <= 1e-6, key


@pytest.mark.usefixtures("torchvision", "inspect_in_process")
def test_mixed_precision_of_linear_attention_with_several_parts_in_a_tensor(
    mixed_qwen: Twins,
) -> None:
    """As nvidia's Qwen3.6: fp8 with a scale for q, k and v in one tensor and another for z."""
    with loaded(mixed_qwen.quantized, skip_tokenizer_init=True) as model:
        layers = assert_every_layer_computes(model, mixed_qwen.stored)
        entries = PROCESS_PLAN.entries.values()
        assert {entry.backend for entry in entries} == {"cpu"}
    assert any("in_proj_qkvz" in name for name in layers)
    assert any("mlp.down_proj" in name for name in layers)


LINEAR_ATTENTION = ("in_proj_qkv", "in_proj_z", "out_proj")
PLAIN = ("in_proj_a", "in_proj_b", "conv1d", "q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def mixed_qwen(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Written before torchvision has a stand-in, which the transformers library would take."""
    fp8 = Float8(shape="", x="static", plain=PLAIN)
    store = Of(fp8, ModelOptWeights("nvfp4"))
    layers = {
        f"model.layers.{i}.linear_attn.{name}": {"quant_algo": "FP8"}
        for i in range(4)
        for name in LINEAR_ATTENTION
    }
    layers |= {
        f"model.layers.{i}.mlp.{name}_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16}
        for i in range(4)
        for name in ("gate", "up", "down")
    }
    config = modelopt("MIXED_PRECISION", quantized_layers=layers)
    path = tmp_path_factory.mktemp("mixed")
    return write_family(WITHOUT_LOGITS["qwen3.5-hybrid"], config, store, path)


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("own-fp8-static", {}),
        ("modelopt-nvfp4", {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}),
    ],
)
def test_scales_of_the_cache_go_to_vllm(
    name: str, quantization: dict[str, Any], cache: str, tmp_path: Path
) -> None:
    """The configuration of fp8 does not say that there are any, but the file has them."""

    def with_scales(tensors: Tensors) -> None:
        for layer, at in itertools.product(range(2), "kv"):
            tensors[f"model.layers.{layer}.self_attn.{at}_proj.{at}_scale"] = torch.tensor(0.5)

    path = changed_copy(name, tmp_path, with_scales, lambda config: config.update(quantization))
    reference = checkpoint_reference(name)
    with loaded(path, kv_cache_dtype=cache) as model:
        ours = logits(model, reference["input_ids"])
        attention = [m for m in model.model.modules() if isinstance(m, AttentionLayerBase)]
        entries = list(PROCESS_PLAN.entries.values())
        scales = {float(layer._k_scale) for layer in attention}
    quantized = cache == "fp8" or bool(quantization)
    assert scales == ({0.5} if quantized else {1.0})
    left = [entry.name for entry in entries if entry.backend == DELEGATED]
    assert left == [f"model.layers.{layer}.self_attn.attn" for layer in range(2)]
    error = torch.log_softmax(ours, -1) - torch.log_softmax(reference["logits_actquant"], -1)
    assert float(error.abs().amax(-1).median()) <= 1e-3
