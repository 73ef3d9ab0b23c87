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

import pytest
import torch

from tests.support.checkpoints import checkpoint, checkpoint_reference
from tests.support.float8_store import Float8
from tests.support.float_models import FloatModel, assert_near
from tests.support.float_models import write as write_floats
from tests.support.messages import says
from tests.support.model_loading import free_port
from tests.support.repository import environment
from tests.support.synthetic import Model, Quant, write
from tests.support.table_models import Bits, TableModel
from tests.support.table_models import write as write_table_model
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
    "static": FloatModel(
        {"quant_method": "fp8", "activation_scheme": "static"}, Float8(shape="", x="static")
    ),
    "blocks-rows-cut": FloatModel(
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        Float8((64, 64), scale="weight_scale_inv", x="group"),
        Model(Quant("gptq"), hidden=256, heads=8, kv_heads=2, intermediate=384),
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
    for name, model in FLOATS.items():
        files = write_floats(model, root / name)
        references[name] = {"input_ids": files.input_ids, "logits": files.logits}
        paths[name] = files.path
    for name in ZOO:
        references[name], paths[name] = checkpoint_reference(name), checkpoint(name)
    jobs = [
        {
            "model": str(paths[name]),
            "input_ids": reference["input_ids"].tolist(),
            "out": str(root / f"{name}.pt"),
            "environment": [{}, {}],
        }
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
    return found | {
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


@pytest.mark.parametrize("name", FLOATS)
def test_two_ranks_give_the_logits_of_one_with_floats(name: str, results: dict[str, Any]) -> None:
    ours, reference = results[name]
    assert_near(ours["logits"], reference, exact=FLOATS[name].store.x == "none")


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
