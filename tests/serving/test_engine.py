# SPDX-License-Identifier: Apache-2.0
"""``LLM()`` with vLLM's defaults: what ran is what the plan says, no compiled graph is stale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import checkpoint, checkpoint_reference
from tests.support.repository import environment
from tests.support.table_models import Bits, TableModel, write
from vllm.compressed_linear import settings

pytestmark = pytest.mark.e2e
TABLE = TableModel(linear=Bits(3, 64, symmetric=False), dtype=torch.bfloat16)
"""Linears of 3 bits, and an embedding table of 8 bits that the head is tied to."""


def run_engine(
    model: str | Path, tmp_path: Path, options: dict[str, Any] | None = None, **changes: str
) -> dict[str, Any]:
    """Start an engine on a directory or a checkpoint of the zoo, return what ``engine_worker.py``
    found."""
    out = tmp_path / "result.pt"
    out.unlink(missing_ok=True)
    env = {k: v for k, v in environment().items() if not k.startswith("VLLM_COMPRESSED_LINEAR")}
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.engine_worker",
            str(out),
            str(model if isinstance(model, Path) else checkpoint(model)),
            json.dumps(options or {}),
        ],
        env=env
        # Where there is AMX, one line more would say that vLLM alone rounds x.
        | {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "VLLM_CPU_INT4_W4A8": "0"}
        | changes,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert out.exists(), process.stderr[-3000:]
    result = torch.load(out)
    result["log"] = process.stdout + process.stderr
    return result


def errors(reference: dict[str, torch.Tensor], result: dict[str, Any]) -> torch.Tensor:
    expected = torch.log_softmax(reference["logits"], -1)[:, :-1]
    return (result["log_probabilities"] - expected).abs()


def backends_of(result: dict[str, Any]) -> set[str]:
    return {layer["backend"] for layer in result["plan"]["layers"]}


def assert_counters_match_the_plan(result: dict[str, Any]) -> None:
    """Every planned layer ran, equally often, through the op of its backend and no other."""
    layers = result["plan"]["layers"]
    native_calls = sum(
        count for op, count in result["counts"]["native"].items() if op.startswith("linear/")
    )
    on_cpu = sum(layer["backend"] == "cpu" for layer in layers)
    on_reference = sum(layer["backend"] == "reference" for layer in layers)
    assert (native_calls > 0) == (on_cpu > 0)
    assert (result["counts"]["reference"] > 0) == (on_reference > 0)
    tables = [layer for layer in layers if "looked up" in layer["descriptor"]]
    lookups = sum(
        count for op, count in result["counts"]["native"].items() if op.startswith("embedding/")
    )
    assert (lookups > 0) == any(layer["backend"] == "cpu" for layer in tables)
    heads = sum(layer["kind"] == "lm_head" for layer in layers)
    for calls, planned in ((native_calls, on_cpu), (result["counts"]["reference"], on_reference)):
        # lm_head runs once more for each batch of prompt log-probabilities.
        body = planned - heads
        if planned:
            passes = (calls - heads) // body
            assert passes >= 1
            assert passes * body <= calls <= passes * body + heads * (passes + 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gptqmodel-gptq-w4-g128-sym-descact", {}),
        ("autoawq-awq-gemm-g128-asym", {"enforce_eager": True}),
        (TABLE, {"max_num_batched_tokens": 16, "max_num_seqs": 2, "skip_tokenizer_init": True}),
    ],
    ids=["gptq-compiled", "awq-eager", "quantized-tied-table-compiled-chunked-prefill"],
)
def test_llm_serves_on_the_native_kernel(
    name: str | TableModel, options: dict[str, Any], tmp_path: Path
) -> None:
    if isinstance(name, TableModel):
        reference = write(name, tmp_path / "model")
        result = run_engine(tmp_path / "model", tmp_path, options)
        assert any("looked up" in layer["descriptor"] for layer in result["plan"]["layers"])
    else:
        reference = checkpoint_reference(name)
        result = run_engine(name, tmp_path, options)
    assert backends_of(result) == {"cpu"}
    assert_counters_match_the_plan(result)
    assert float(errors(reference, result).mean()) <= 0.03
    assert result["tokens"] == result["tokens_again"]
    assert result["log"].count("compressed_linear: ") == 1


def test_a_change_of_backend_is_never_served_from_a_stale_graph(tmp_path: Path) -> None:
    """Serve with A, override to B, serve again, and A again: the cache directory is one."""
    name = "gptqmodel-gptq-w4-g128-sym"
    results = []
    for backend in ("cpu", "reference", "cpu"):
        override = {settings.BACKEND: f"{backend},unquantized={backend}"}
        result = run_engine(name, tmp_path, {"dtype": "float32"}, **override)
        assert backends_of(result) == {backend}
        assert_counters_match_the_plan(result)
        assert float(errors(checkpoint_reference(name), result).max()) <= 1e-4
        results.append(result)
    fingerprints = [result["plan"]["fingerprint"] for result in results]
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]
