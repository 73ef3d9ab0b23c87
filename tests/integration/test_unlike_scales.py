# SPDX-License-Identifier: Apache-2.0
"""Fused layers whose members have scales that differ by a factor of up to 128, as whole models
against definitions in numpy: each member keeps its own, of which vLLM takes the largest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.choice import use_backend
from tests.support.compressed_tensors_store import CompressedWeight
from tests.support.defined_models import (
    Defined,
    assert_computes_its_definition,
    defined,
    run_defined,
)
from tests.support.float8_store import Float8
from tests.support.float_models import SMALL, FloatModel, Store, write
from tests.support.format_configs import auto_round, compressed_fp8, modelopt
from tests.support.model_loading import loaded
from tests.support.modelopt_store import ModelOptWeights
from tests.support.quark_store import QuarkWeight
from tests.support.synthetic import Model
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

FP8 = Float8(shape="", unlike=True)
FP8_STATIC = replace(FP8, x="static")
FP4 = CompressedWeight(4, "nvfp4-pack-quantized", "tensor_group", 16, unlike=True)
TENSOR = {"strategy": "tensor"}
INT8 = CompressedWeight(strategy="tensor", unlike=True)


def of(store: CompressedWeight | QuarkWeight) -> tuple[dict[str, Any], Store]:
    return store.config, store


VARIANTS: dict[str, tuple[dict[str, Any], Store]] = {
    "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static"}, FP8_STATIC),
    "fp8-tensor": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        replace(FP8, x="token"),
    ),
    "fp8-divisors": (
        {"quant_method": "fp8", "method": "fp8", "weight_scale_semantics": "inverse"},
        replace(FP8, scale="weight_scale_inv", inverse=True),
    ),
    "compressed-tensors-fp8-static": (
        compressed_fp8(TENSOR, TENSOR | {"dynamic": False}),
        replace(FP8_STATIC, shape="1"),
    ),
    "compressed-tensors-fp8-tensor": (
        compressed_fp8(TENSOR, {"strategy": "token", "dynamic": True}),
        replace(FP8, shape="1", x="token"),
    ),
    "compressed-tensors-int8-static": of(replace(INT8, x="static")),
    "compressed-tensors-int8-static-asymmetric": of(replace(INT8, x="static-asymmetric")),
    "compressed-tensors-int8-tensor": of(replace(INT8, x="token")),
    "compressed-tensors-nvfp4": of(replace(FP4, x="nvfp4")),
    "compressed-tensors-nvfp4-a16": of(FP4),
    "modelopt-fp8": (modelopt("FP8"), FP8_STATIC),
    "modelopt-nvfp4": (modelopt("NVFP4"), ModelOptWeights("nvfp4", "nvfp4", unlike=True)),
    "modelopt-nvfp4-a16": (modelopt("W4A16_NVFP4"), ModelOptWeights("nvfp4", unlike=True)),
    "modelopt-nvfp4-under-fp8": (
        modelopt("W4A8_NVFP4_FP8"),
        ModelOptWeights("nvfp4", "fp8", unlike=True),
    ),
    "modelopt-int4-under-fp8": (
        modelopt("W4A8_AWQ"),
        ModelOptWeights("int4", "fp8", prescaled=("o_proj",), unlike=True),
    ),
    "modelopt-int8": (
        modelopt("W8A8_SQ_PER_CHANNEL"),
        ModelOptWeights("int8", "int8", prescaled=("down_proj",), unlike=True),
    ),
    "quark-fp8-static": of(QuarkWeight("fp8", x="static", unlike=True)),
    "quark-int8-static": of(QuarkWeight("int8", x="static", unlike=True)),
    "quark-int4-fp8": of(QuarkWeight("int4-fp8", x="static", unlike=True)),
    "quark-nvfp4": of(QuarkWeight("nvfp4", x="own", unlike=True)),
    "auto-round-fp8-static": (
        auto_round(
            bits=8,
            group_size=0,
            data_type="fp",
            packing_format="auto_round:fp8",
            act_bits=8,
            act_group_size=0,
            act_dynamic=False,
        ),
        FP8_STATIC,
    ),
}


LARGEST = {"q_proj": "v_proj", "k_proj": "v_proj", "gate_proj": "up_proj"}
"""The member of the same fused layer that has the largest scale of x."""


def with_the_largest_scale(layers: dict[str, Defined]) -> dict[str, Defined]:
    """Layers whose x is rounded with the largest scale of the fused one."""
    found = {}
    for module, layer in layers.items():
        parent, _, last = module.rpartition(".")
        other = layers[f"{parent}.{LARGEST.get(last, last)}"]
        found[module] = replace(layer, prepare=other.prepare)
    return found


@pytest.mark.parametrize("backend", ["reference", ""])
@pytest.mark.parametrize("name", VARIANTS)
def test_members_of_fused_layers_keep_their_own_scales(
    name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend:
        use_backend(monkeypatch, backend)
    config, store = VARIANTS[name]
    files = write(FloatModel(config, store, Model(**SMALL, layers=2)), tmp_path)
    layers = defined(files)
    assert len(layers) == 14
    with loaded(files.path) as model:
        assert_computes_its_definition(model, files.path, files.input_ids, layers)
    assert {e.backend for e in PROCESS_PLAN.entries.values()} <= (
        {backend} if backend else {"cpu", "cpu_int8"}
    )
    if any("input" in tensor for stored in files.stored.values() for tensor in stored.tensors):
        own, _ = run_defined(files.path, files.input_ids, layers)
        largest, _ = run_defined(files.path, files.input_ids, with_the_largest_scale(layers))
        assert float((own - largest).abs().max()) >= 0.02
