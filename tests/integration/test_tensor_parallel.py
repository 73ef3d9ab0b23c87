# SPDX-License-Identifier: Apache-2.0
"""Two ranks give the logits of one: transformers' fp32 logits of the dequantized model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.checkpoints import checkpoint, checkpoint_reference
from tests.support.compressed_tensors_store import CompressedWeight
from tests.support.defined_models import Defined, run_defined
from tests.support.float8_store import Float8
from tests.support.float_definitions import Floats, Single
from tests.support.float_models import SMALL, FloatModel, Prepared, Store, Written
from tests.support.float_models import write as write_floats
from tests.support.format_configs import auto_round, compressed_fp8, modelopt
from tests.support.messages import says
from tests.support.model_loading import free_port
from tests.support.modelopt_store import ModelOptWeights
from tests.support.quark_store import QuarkWeight
from tests.support.repository import environment
from tests.support.synthetic import Model, Quant, write
from tests.support.table_models import Bits, TableModel
from tests.support.table_models import write as write_table_model
from tests.support.tensor_parallel_worker import inputs_file
from vllm.compressed_linear import settings
from vllm.compressed_linear.prepare.cache.inventory import read_cache

MODELS = {
    "group-cut-by-the-border": Model(Quant("gptq", group_size=128), hidden=192, heads=6),
    "group-cut-asymmetric-ct": Model(
        Quant("ct", group_size=128, symmetric=False), hidden=192, heads=6
    ),
    "act-order": Model(Quant("gptq", group_size=32, act_order=True, symmetric=False)),
    "act-order-3-bit": Model(Quant("gptq", bits=3, group_size=32, act_order=True)),
    "one-kv-head-replicated": Model(Quant("gptq"), kv_heads=1),
    "one-kv-head-awq": Model(Quant("awq", symmetric=False), kv_heads=1),
    "odd-vocab": Model(Quant("gptq"), vocab=501),
    "codes-not-aligned-to-words": Model(
        Quant("gptq", bits=3, group_size=24), hidden=96, heads=4, kv_heads=2
    ),
    "fused-on-disk": Model(Quant("gptq", symmetric=False), "Phi3ForCausalLM"),
    "fused-on-disk-one-kv-head": Model(
        Quant("awq", symmetric=False), "Phi3ForCausalLM", kv_heads=1
    ),
    "unlike-shards": Model(
        Quant("ct"), overrides={"q_proj": Quant("ct", bits=8), "gate_proj": None}
    ),
    "channel": Model(Quant("ct", bits=6, group_size=-1)),
}
TABLES = {
    "quantized-tied-table": TableModel("llama", table=Bits(8, 32, False), vocabulary=501),
    "quantized-table-and-head": TableModel("llama", tied=False, head=Bits(6, 64), vocabulary=501),
    "unquantized-tied-table": TableModel("gemma3", table=None, vocabulary=501),
}
FP8_STATIC = Float8(shape="", x="static")
NVFP4 = CompressedWeight(4, "nvfp4-pack-quantized", "tensor_group", 16, x="nvfp4")
MXFP4 = CompressedWeight(4, "mxfp4-pack-quantized", "group", 32, x="mxfp4")
PACKED = CompressedWeight(4, "pack-quantized", "group", x="token")
AWQ = ("o_proj", "down_proj")
CHANNEL, TOKEN = {"strategy": "channel"}, {"strategy": "token", "dynamic": True}
BLOCK = {"strategy": "block", "block_structure": [128, 128]}
GROUP = {"strategy": "group", "group_size": 128, "dynamic": True}


def tiny(config: dict[str, Any], store: Store) -> FloatModel:
    return FloatModel(config, store, Model(**SMALL))


def of(store: CompressedWeight | QuarkWeight) -> FloatModel:
    return tiny(store.config, store)


FLOATS = {
    "divisors-cut-blocks": FloatModel(
        {
            "quant_method": "fp8",
            "method": "fp8",
            "weight_scale_semantics": "inverse",
            "weight_block_size": [128, 128],
        },
        Float8((128, 128), scale="weight_scale_inv", inverse=True),
        Model(Quant("gptq"), hidden=192, heads=6, intermediate=200),
    ),
    "static": tiny({"quant_method": "fp8", "activation_scheme": "static"}, FP8_STATIC),
    "blocks-rows-cut": FloatModel(
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        Float8((64, 64), scale="weight_scale_inv", x="group"),
        Model(Quant("gptq"), hidden=256, heads=8, kv_heads=2, intermediate=384),
    ),
    "fbgemm": tiny({"quant_method": "fbgemm_fp8"}, Float8(shape="N1", x="token")),
    "modelopt-fp8": tiny(modelopt("FP8"), FP8_STATIC),
    "modelopt-nvfp4": tiny(modelopt("NVFP4"), ModelOptWeights("nvfp4", "nvfp4", unlike=True)),
    "modelopt-awq": tiny(modelopt("W4A16_AWQ"), ModelOptWeights("int4", prescaled=AWQ)),
    "modelopt-awq-under-fp8": tiny(
        modelopt("W4A8_AWQ"), ModelOptWeights("int4", "fp8", prescaled=AWQ)
    ),
    "modelopt-int8": tiny(
        modelopt("W8A8_SQ_PER_CHANNEL"), ModelOptWeights("int8", "int8", prescaled=AWQ)
    ),
    "compressed-tensors-fp8-channel": tiny(
        compressed_fp8(CHANNEL, TOKEN), Float8(shape="N1", x="token")
    ),
    "compressed-tensors-fp8-block": tiny(
        compressed_fp8(BLOCK, GROUP), Float8((128, 128), x="group")
    ),
    "compressed-tensors-nvfp4": of(NVFP4),
    "compressed-tensors-mxfp4": of(MXFP4),
    "compressed-tensors-w4a8-int": of(PACKED),
    "compressed-tensors-w4a8-fp8": of(replace(PACKED, x="fp8")),
    "compressed-tensors-int8": of(CompressedWeight(x="static-asymmetric")),
    "quark-fp8": of(QuarkWeight("fp8", x="static", unlike=True)),
    "quark-int8": of(QuarkWeight("int8", x="static", unlike=True)),
    "quark-uint4": of(QuarkWeight("uint4")),
    "quark-int4-fp8": of(QuarkWeight("int4-fp8", x="token")),
    "quark-mxfp6": of(QuarkWeight("mxfp6", x="own")),
    "quark-nvfp4": of(QuarkWeight("nvfp4", x="own")),
    "auto-round-mxfp4": tiny(
        auto_round(bits=4, act_bits=4, data_type="mx_fp", group_size=32, act_data_type="mx_fp"),
        MXFP4,
    ),
}
ZOO = ["gptqmodel-gptq-w4-g128-sym-descact", "gptqmodel-gptq-w4-g64-sym-lmhead"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every model on two ranks, in one pair of processes."""
    root = tmp_path_factory.mktemp("tensor-parallel")
    references = {name: write(model, root / name) for name, model in MODELS.items()}
    references |= {name: write_table_model(model, root / name) for name, model in TABLES.items()}
    paths = {name: root / name for name in references}
    written: dict[str, Written] = {}
    for name, model in FLOATS.items():
        files = write_floats(model, root / name)
        references[name] = {"input_ids": files.input_ids, "logits": files.logits}
        written[name], paths[name] = files, files.path
    for name in ZOO:
        references[name], paths[name] = checkpoint_reference(name), checkpoint(name)
    jobs = [
        {
            "model": str(paths[name]),
            "input_ids": reference["input_ids"].tolist(),
            "out": str(root / f"{name}.pt"),
            "environment": [{}, {}],
        }
        | ({"record": list(written[name].stored)} if name in written else {})
        for name, reference in references.items()
    ]
    cached = {settings.CACHE: str(root / "cache")}
    jobs += [
        jobs[0] | {"environment": [cached, cached], "out": str(root / f"{out}.pt")}
        for out in ("cache-filled", "cache-used")
    ]
    unlike = {settings.BACKEND: "*.down_proj=reference"}
    jobs.append(jobs[0] | {"environment": [{}, unlike], "out": str(root / "unlike.pt")})
    other = str(root / next(iter(MODELS)) / "other")
    write(replace(next(iter(MODELS.values())), seed=1), Path(other))
    jobs.append(jobs[0] | {"reload": other, "out": str(root / "refused.pt")})
    (root / "jobs.json").write_text(json.dumps(jobs))
    port = str(free_port())
    worker = [sys.executable, "-m", "tests.support.tensor_parallel_worker"]
    logs = [(root / f"rank{rank}.log").open("w+") for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [*worker, str(rank), "2", port, str(root / "jobs.json")],
            env=environment(),
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        codes = [process.wait(timeout=300) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if codes != [0, 0]:
        pytest.fail("\n".join(Path(log.name).read_text()[-6000:] for log in logs))
    found = {
        name: (torch.load(root / f"{name}.pt"), reference["logits"])
        for name, reference in references.items()
    }
    inputs = {
        name: [
            torch.load(inputs_file(str(root / f"{name}.pt"), rank), weights_only=False)
            for rank in range(2)
        ]
        for name in written
    }
    return found | {
        "written": written,
        "inputs": inputs,
        "log": (root / "rank0.log").read_text(),
        "cache": root / "cache",
        "refused": torch.load(root / "refused.pt"),
        "cached": [torch.load(root / f"{out}.pt") for out in ("cache-filled", "cache-used")],
    }


@pytest.mark.parametrize("name", [*MODELS, *TABLES, *ZOO])
def test_two_ranks_give_the_logits_of_one(name: str, results: dict[str, Any]) -> None:
    ours, reference = results[name]
    vocab = reference.shape[-1]
    error = torch.log_softmax(ours["logits"][..., :vocab], -1) - torch.log_softmax(reference, -1)
    assert float(error.abs().max()) <= 1e-4


def divided(prepare: Prepared) -> Prepared:
    """What each of two ranks does to its channels."""

    def halves(x: Single) -> Floats:
        return np.concatenate([prepare(half) for half in np.split(x, 2, 1)], 1)

    return halves


@pytest.mark.parametrize("name", FLOATS)
def test_two_ranks_compute_the_definition(name: str, results: dict[str, Any]) -> None:
    """Where x of a layer is divided among them, dynamic scales are of what a rank has."""
    files, (first, second) = results["written"][name], results["inputs"][name]
    store = FLOATS[name].store
    tokens = ("token", "fp8") if isinstance(store, CompressedWeight) else ("token", "group")
    layers, given = {}, {}
    for module, stored in files.stored.items():
        layers[module] = Defined(stored.meaning, stored.prepare)
        if module.endswith(AWQ):
            given[module] = np.concatenate([first[module], second[module]], 1)
            if getattr(store, "x", "none") in tokens:
                layers[module] = replace(layers[module], prepare=divided(stored.prepare))
        else:
            assert np.array_equal(first[module], second[module])
            given[module] = first[module]
    expected, apart = run_defined(files.path, files.input_ids, layers, given)
    ours = torch.log_softmax(results[name][0]["logits"][..., : expected.shape[-1]], -1)
    assert apart <= 1e-5
    assert float((ours - expected).abs().max()) <= 1e-4


def test_ranks_that_choose_differently_say_so(results: dict[str, Any]) -> None:
    log = results["log"]
    assert log.count("Ranks run a layer on different backends") == 1
    assert re.search(r"mlp\.down_proj: rank 0 runs \['cpu .*'\], rank 1 \['reference'\]", log)


def test_each_rank_keeps_its_own_prepared_weights(results: dict[str, Any]) -> None:
    filled, used = results["cached"]
    assert set(filled["cache"]) == {"miss"}
    assert set(used["cache"]) == {"hit"}
    expected, _ = results[next(iter(MODELS))]
    assert torch.equal(used["logits"], expected["logits"])
    entries = Counter(entry.entry.label.layer for entry in read_cache(results["cache"]))
    assert set(entries.values()) == {2}
    assert len(entries) == len(used["cache"])


def test_a_reload_that_one_rank_refuses_leaves_the_old_weights_on_all(
    results: dict[str, Any],
) -> None:
    refused = results["refused"]
    expected, _ = results[next(iter(MODELS))]
    assert says(refused["told"], "old weights", "rank 1", "down_proj", "seen on rank 1 only")
    assert torch.equal(refused["logits"], expected["logits"])
