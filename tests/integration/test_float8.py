# SPDX-License-Identifier: Apache-2.0
"""Weights in 8-bit floats in every variant that files have, against definitions in numpy."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.architectures import (
    FAMILIES,
    MIXTURE,
    WITHOUT_LOGITS,
    Family,
    layer_outputs,
)
from tests.support.damages import untold_damages
from tests.support.defined_models import assert_computes_its_definition, defined
from tests.support.described import Described
from tests.support.float8_store import Float8
from tests.support.float_models import (
    SMALL,
    FloatModel,
    Stored,
    Written,
    assert_every_layer_computes,
    assert_near,
    write,
    write_family,
)
from tests.support.messages import saying
from tests.support.model_loading import loaded, logits
from tests.support.shards import assert_ranks_hold_the_whole
from tests.support.synthetic import Model
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration.delegation import RefusedByVllmError
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.prepare.plan import DELEGATED

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TINY = BLOCKS | {"weight_block_size": [32, 64]}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
DYNAMIC = {"quant_method": "fp8", "activation_scheme": "dynamic"}
INVERSE = {
    "quant_method": "fp8",
    "method": "fp8",
    "format": "float8_e4m3fn",
    "weight_scale_semantics": "inverse",
}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
INV = "weight_scale_inv"


@dataclass(frozen=True)
class Variant:
    config: dict[str, Any]
    store: Float8
    shape: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "scalars": Variant(STATIC, Float8(shape="", x="static")),
    "scalars-one-by-one-bf16": Variant(
        STATIC, Float8(shape="11", x="static", scale_dtype=torch.bfloat16)
    ),
    "static-called-activation-scale": Variant(
        STATIC, Float8(scale=INV, x="static", input_scale="activation_scale")
    ),
    "static-without-saying": Variant({"quant_method": "fp8"}, Float8(x="static")),
    "dynamic-tensor": Variant(DYNAMIC, Float8(x="token")),
    "dynamic-without-saying": Variant({"quant_method": "fp8"}, Float8(x="token")),
    "channel": Variant(DYNAMIC, Float8(shape="N1", x="token"), {"bias": True}),
    "channel-vector-static": Variant(STATIC, Float8(shape="N", x="static")),
    "e5m2": Variant(DYNAMIC, Float8(shape="N1", x="token", e5m2=True)),
    "fbgemm": Variant(FBGEMM, Float8(shape="N1", x="token", plain=("down_proj",), limit=1200.0)),
    "fbgemm-with-a-low-limit": Variant(
        FBGEMM | {"activation_scale_ub": 0.5}, Float8(shape="N1", x="token", limit=0.5)
    ),
    "fbgemm-without-saying": Variant(
        {"quant_method": "fbgemm_fp8"}, Float8(shape="N1", x="token", limit=1200.0)
    ),
    "blocks": Variant(BLOCKS, Float8((128, 128), scale=INV, x="group"), {"bias": True}),
    "blocks-bf16-scales": Variant(
        BLOCKS, Float8((128, 128), scale=INV, x="group", scale_dtype=torch.bfloat16)
    ),
    "blocks-e8m0": Variant(
        BLOCKS | {"scale_fmt": "ue8m0"},
        Float8((128, 128), scale="scale", x="ue8m0", scale_dtype=torch.float8_e8m0fnu),
    ),
    "blocks-e8m0-bytes": Variant(
        BLOCKS, Float8((128, 128), scale=INV, x="group", scale_dtype=torch.uint8)
    ),
    "blocks-powers-of-two": Variant(
        BLOCKS | {"scale_fmt": "ue8m0"}, Float8((128, 128), scale=INV, x="ue8m0")
    ),
    "blocks-ragged-and-members-inside": Variant(
        BLOCKS,
        Float8((128, 128), scale=INV, x="group"),
        {"hidden": 192, "heads": 6, "kv_heads": 2, "intermediate": 200},
    ),
    "blocks-of-another-size": Variant(
        TINY, Float8((32, 64), scale=INV, x="group"), {"hidden": 96, "heads": 3, "kv_heads": 1}
    ),
    "blocks-called-weight-scale": Variant(BLOCKS, Float8((128, 128), x="group")),
    "blocks-tied": Variant(BLOCKS, Float8((128, 128), scale=INV, x="group"), model={"tied": True}),
    "blocks-and-head": Variant(
        BLOCKS, Float8((128, 128), scale=INV, x="group"), {"vocab": 501}, {"head": True}
    ),
    "blocks-and-plain-members": Variant(
        BLOCKS | {"modules_to_not_convert": ["v_proj", "up_proj", "mlp.down_proj"]},
        Float8((128, 128), scale=INV, x="group", plain=("v_proj", "up_proj", "down_proj")),
    ),
    "divisors-of-blocks": Variant(
        INVERSE | {"weight_block_size": [128, 128], "weight_scale_method": "block"},
        Float8((128, 128), scale=INV, inverse=True),
    ),
    "divisors-of-rows": Variant(
        INVERSE | {"weight_scale_method": "row"}, Float8(shape="N", scale=INV, inverse=True)
    ),
    "divisors-of-tensors": Variant(
        INVERSE | {"weight_scale_method": "tensor"}, Float8(shape="", scale=INV, inverse=True)
    ),
}


DOWN = "model.layers.0.mlp.down_proj"
K = "model.layers.0.self_attn.k_proj"
Tensors = dict[str, torch.Tensor]


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _with(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


DAMAGES: dict[str, tuple[str, Callable[[Tensors], object], tuple[object, ...]]] = {
    "no scale": ("blocks", lambda t: t.pop(f"{K}.{INV}"), (f"{K}.{INV}", "not in the checkpoint")),
    "no codes": ("blocks", lambda t: t.pop(f"{DOWN}.weight"), (f"{DOWN}.weight",)),
    "no input scale": (
        "scalars",
        lambda t: t.pop(f"{K}.input_scale"),
        (f"{K}.input_scale", "not in the checkpoint"),
    ),
    "blocks of another size": (
        "blocks",
        _set(f"{DOWN}.{INV}", lambda t: t.repeat_interleave(2, 1)),
        (f"{DOWN}.{INV}", [1, 4], [1, 2], "block 128x128"),
    ),
    "transposed blocks": (
        "blocks",
        _set(f"{DOWN}.{INV}", lambda t: t.t()),
        (f"{DOWN}.{INV}", [2, 1], [1, 2]),
    ),
    "one scale of two blocks": (
        "blocks",
        _set(f"{DOWN}.{INV}", lambda t: t[:, :1]),
        (f"{DOWN}.{INV}", [1, 1], [1, 2], "block 128x128"),
    ),
    "bytes as scales of channels": (
        "fbgemm",
        _set(f"{K}.weight_scale", lambda t: (t * 0 + 120).to(torch.uint8)),
        (f"{K}.weight_scale", "uint8"),
    ),
    "a scale under which weights overflow": (
        "channel",
        _set(f"{K}.weight_scale", _with(3e38)),
        (f"{K}.weight_scale", "3e+38", "fp32"),
    ),
    "wide floats with scales of DeepSeek-V4": (
        "blocks-e8m0",
        _set(f"{DOWN}.weight", lambda t: t.to(torch.bfloat16)),
        (f"{DOWN}.weight", "bfloat16", "float8_e4m3fn"),
    ),
    "two scales of a tensor": (
        "scalars",
        _set(f"{DOWN}.weight_scale", lambda t: t.repeat(2)),
        (f"{DOWN}.weight_scale", [2], [1]),
    ),
    "too few channels": (
        "channel",
        _set(f"{DOWN}.weight_scale", lambda t: t[:-1]),
        (f"{DOWN}.weight_scale", [127, 1]),
    ),
    "fewer rows": ("channel", _set(f"{K}.weight", lambda t: t[:-8]), (f"{K}.weight", [56, 128])),
    "bytes instead of floats": (
        "blocks",
        _set(f"{DOWN}.weight", lambda t: t.view(torch.uint8)),
        (f"{DOWN}.weight", "uint8", "float8_e4m3fn"),
    ),
    "wide floats with scales": (
        "blocks",
        _set(f"{DOWN}.weight", lambda t: t.to(torch.bfloat16)),
        (f"{DOWN}.weight", "bfloat16", "float8_e4m3fn"),
    ),
    "integer scales": (
        "channel",
        _set(f"{DOWN}.weight_scale", lambda t: t.to(torch.int32)),
        (f"{DOWN}.weight_scale", "int32"),
    ),
    "NaN": ("blocks", _set(f"{K}.{INV}", _with(float("nan"))), (f"{K}.{INV}", "finite", "nan")),
    "infinite": (
        "scalars",
        _set(f"{K}.weight_scale", _with(float("inf"))),
        (f"{K}.weight_scale", "finite", "inf"),
    ),
    "zero": ("channel", _set(f"{K}.weight_scale", _with(0)), (f"{K}.weight_scale", "scale", 0)),
    "divisor of zero": (
        "divisors-of-rows",
        _set(f"{K}.{INV}", _with(0)),
        (f"{K}.{INV}", "finite", "inf"),
    ),
    "NaN among the codes": (
        "channel",
        _set(f"{K}.weight", lambda t: _with(0x7F)(t.view(torch.uint8)).view(t.dtype)),
        (f"{K}.weight", "nan", "channel 0"),
    ),
    "an infinite code": (
        "e5m2",
        _set(f"{K}.weight", lambda t: _with(0xFC)(t.view(torch.uint8)).view(t.dtype)),
        (f"{K}.weight", "-inf", "channel 0"),
    ),
    "input scale of zero": (
        "scalars",
        _set(f"{K}.input_scale", _with(0)),
        (f"{K}.input_scale", "other than 0"),
    ),
    "input scale under which x overflows": (
        "scalars",
        _set(f"{K}.input_scale", _with(3e38)),
        (f"{K}.input_scale", "finite", "below"),
    ),
    "input scale that is not a number": (
        "scalars",
        _set(f"{K}.input_scale", _with(float("nan"))),
        (f"{K}.input_scale", "nan"),
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Variant, Written]:
    variant = VARIANTS[request.param]
    model = FloatModel(
        variant.config, variant.store, Model(**SMALL | variant.shape), **variant.model
    )
    return variant, write(model, tmp_path_factory.mktemp("float8"))


def test_every_layer_computes_what_its_file_means(written: tuple[Variant, Written]) -> None:
    variant, files = written
    with loaded(files.path) as model:
        layers = assert_every_layer_computes(model, files.stored)
        if variant.model.get("head"):
            assert_near(logits(model, files.input_ids), files.logits, exact=False)
        else:
            assert_computes_its_definition(model, files.path, files.input_ids, defined(files))
        entries = PROCESS_PLAN.entries.values()
        assert {entry.backend for entry in entries} == {"cpu"}
    assert len(layers) >= 4


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_files_are_one_clear_error(what: str, tmp_path: Path) -> None:
    name, damage, complaint = DAMAGES[what]
    variant = VARIANTS[name]
    shape = Model(**SMALL | variant.shape)
    files = write(FloatModel(variant.config, variant.store, shape, **variant.model), tmp_path)
    tensors = load_file(files.path / "model.safetensors")
    damage(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, files.path / "model.safetensors")
    with pytest.raises(ValueError, match=saying(*complaint)) as caught, loaded(files.path):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_damage_of_a_tensor_is_right_or_told(name: str) -> None:
    variant = VARIANTS[name]
    # The reciprocal of a large number is a small one.
    harmless = [f"{INV} with 3e+38"] if variant.store.inverse else []
    assert untold_damages(variant.config, variant.store, 200, 328, harmless) == []


@dataclass(frozen=True)
class Attention(Float8):
    """Routers and experts stay as they are."""

    def __call__(self, module: str, n: int, k: int, generator: torch.Generator) -> Stored | None:
        if ".experts." in module or module.endswith("mlp.gate"):
            return None
        return super().__call__(module, n, k, generator)


@pytest.mark.parametrize("name", ["dynamic-tensor", "blocks", "divisors-of-blocks"])
def test_a_scale_of_x_that_nothing_needs_is_taken_and_not_used(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    shape = Model(**SMALL | variant.shape)
    files = write(FloatModel(variant.config, variant.store, shape, **variant.model), tmp_path)
    tensors = load_file(files.path / "model.safetensors")
    tensors |= {f"{module}.input_scale": torch.tensor(0.01) for module in files.stored}
    save_file(tensors, files.path / "model.safetensors")
    with loaded(files.path) as model:
        ours = logits(model, files.input_ids)
    assert_near(ours, files.logits, exact=variant.store.x == "none")


def test_the_limit_of_x_is_taken_from_the_configuration(tmp_path: Path) -> None:
    """transformers never reads or writes ``input_scale_ub``, which its modules have."""
    variant = VARIANTS["fbgemm-with-a-low-limit"]
    files = write(FloatModel(variant.config, variant.store, Model(**SMALL)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"{module}.input_scale_ub": torch.zeros(1) for module in files.stored}
    save_file(tensors, tmp_path / "model.safetensors")
    with loaded(tmp_path) as model:
        assert_every_layer_computes(model, files.stored)
        entries = PROCESS_PLAN.entries.values()
        assert all("limit 0.5" in e.descriptor for e in entries if "e4m3" in e.descriptor)
    for wrong in (0, -1, "many", float("inf"), True, [1200]):
        with pytest.raises(ConfigError, match=saying("activation_scale_ub", "positive")):
            Described.of(FBGEMM | {"activation_scale_ub": wrong})


LATENT = {
    "blocks": (BLOCKS, Attention((128, 128), scale=INV, x="group")),
    "blocks-powers-of-two": (
        BLOCKS | {"scale_fmt": "ue8m0"},
        Attention((128, 128), scale=INV, x="ue8m0"),
    ),
    "static": (STATIC, Attention(x="static")),
    "channels": (DYNAMIC, Attention(shape="N1", x="token")),
}


@pytest.mark.usefixtures("inspect_in_process")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_gets_weights_without_the_rounding_of_x(
    name: str, dtype: str, tmp_path: Path
) -> None:
    config, store = LATENT[name]
    twins = write_family(WITHOUT_LOGITS["deepseek3-latent-attention"], config, store, tmp_path)
    ours = layer_outputs(twins.quantized, dtype=dtype)
    ideal = layer_outputs(twins.ideal, dtype="float32")
    derived = [key for key in ideal if key.endswith(("W_UV", "W_UK_T"))]
    assert len(derived) == 4
    for key in derived:
        error = (ours[key] - ideal[key]).abs().max() / ideal[key].abs().max()
        assert float(error) <= (1e-6 if dtype == "float32" else 2.0**-7), key


@pytest.mark.usefixtures("inspect_in_process")
@pytest.mark.parametrize("family", ["falcon-kv-groups", "falcon-fused-by-heads"])
def test_a_model_that_reorders_rows_of_weights_but_not_of_blocks_is_refused(
    family: str, tmp_path: Path
) -> None:
    store = Float8((128, 128), scale=INV, x="group")
    twins = write_family(FAMILIES[family], BLOCKS, store, tmp_path)
    with (
        pytest.raises(ConfigError, match=saying("query_key_value", "reorders", INV)),
        loaded(twins.quantized, skip_tokenizer_init=True),
    ):
        pass


@pytest.mark.usefixtures("inspect_in_process")
def test_the_same_model_runs_with_scales_of_rows(tmp_path: Path) -> None:
    config = INVERSE | {"weight_scale_method": "row"}
    store = Float8(shape="N", scale=INV, inverse=True)
    twins = write_family(FAMILIES["falcon-kv-groups"], config, store, tmp_path)
    ours, ideal = (layer_outputs(path) for path in (twins.quantized, twins.ideal))
    for name, expected in ideal.items():
        error = (ours[name] - expected).abs().max() / expected.abs().max()
        assert float(error) <= 1e-5, name


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    MIXTURE,
    quantized=r"layers\.\d+\.(self_attn|.*experts\.\d+)\..*\.weight$",
)


def test_experts_whose_scales_vllm_would_misread_are_refused(tmp_path: Path) -> None:
    store = Float8((128, 128), scale=INV, inverse=True, plain=("gate",))
    twins = write_family(MIXTRAL, INVERSE | {"weight_block_size": [128, 128]}, store, tmp_path)
    with (
        pytest.raises(ConfigError, match=saying(re.compile(r"layers\.0\.\S+experts"), "divisors")),
        loaded(twins.quantized, skip_tokenizer_init=True),
    ):
        pass


def test_experts_are_vllms_and_it_says_which_it_cannot_run(tmp_path: Path) -> None:
    """vLLM of today runs none on a processor without AMX."""
    store = Float8((128, 128), scale=INV, x="group", plain=("gate",))
    twins = write_family(MIXTRAL, BLOCKS, store, tmp_path)
    try:
        with loaded(twins.quantized, "bfloat16", skip_tokenizer_init=True):
            experts = [e for e in PROCESS_PLAN.entries.values() if "experts" in e.name]
            assert {entry.backend for entry in experts} == {DELEGATED}
    except RefusedByVllmError as error:
        assert re.search(r"layers\.0\.\S+experts: RoutedExperts", str(error))  # noqa: PT017


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_together_hold_the_whole_weight(name: str, axis: str, ranks: int) -> None:
    """Slices that cut blocks, and the last one with a short block."""
    variant = VARIANTS[name]
    assert_ranks_hold_the_whole(variant.config, variant.store, axis, ranks, 200, 328)
