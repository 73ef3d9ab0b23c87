# SPDX-License-Identifier: Apache-2.0
"""What benchmarks measure with: that they count right, and that everybody computes the same."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader

from benchmarks import checkpoint, contest, markdown_models, ours, timing
from benchmarks.contender import Contender
from benchmarks.remote import STOCK, CannotRunError, RemoteContender, Vllm, checkpoint_tensors
from benchmarks.schemes import SCHEMES
from benchmarks.serving import (
    llama_file,
    memory,
    models,
    step_worker,
    vllm_engine,
    vllm_worker,
    workload,
)
from benchmarks.serving.workload import Stream
from tests.support.model_loading import loaded
from tests.support.model_loading import logits as model_logits
from tests.support.stock_vllm import W4A16, needs_vllms_4_bit_kernel


@pytest.fixture
def tiny_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few copies suffice to exceed it."""
    for module in ("contender", "contest", "remote"):
        monkeypatch.setattr(f"benchmarks.{module}.cache_bytes", lambda: 1, raising=False)


def test_summary_gives_median_and_distance_of_the_quartiles() -> None:
    times = [timing.Elapsed(wall=2.0 * t, cpu=t) for t in (1.0, 2.0, 3.0, 4.0, 5.0)]
    torch.set_num_threads(1)
    found = timing.summary(times)
    assert found["median_ms"] == 3000.0
    assert found["best_ms"] == 1000.0
    assert found["spread"] == pytest.approx(1.0)
    assert found["median_wall_ms"] == 6000.0


@pytest.mark.usefixtures("tiny_cache")
@pytest.mark.parametrize("name", SCHEMES)
def test_our_backends_compute_each_kind(name: str) -> None:
    problem = SCHEMES[name].problem(256, 512)
    can, cannot = ours.able(problem)
    assert can or cannot
    for backend in can:
        contender = ours.contender(problem, backend)
        contest.check(contender, problem, contest.contract_of(contender, problem))


@pytest.mark.usefixtures("tiny_cache")
def test_a_contender_that_computes_another_layer_is_not_timed() -> None:
    problem = SCHEMES["w4"].problem(64, 256)
    wrong = {"weight": problem.weight.bfloat16().flip(0)}
    other = Contender("other", lambda x, t: x @ t["weight"].t(), (wrong,))
    with pytest.raises(SystemExit, match="other: relative error"):
        contest.check(other, problem)


@pytest.mark.parametrize("name", ["w4", "w8a8", "w8a8-fp8", "bf16"])
def test_vllm_is_given_the_same_weights(name: str) -> None:
    problem = SCHEMES[name].problem(64, 256)
    tensors = checkpoint_tensors(SCHEMES[name].stock, problem)
    if name == "w4":
        words = tensors["weight_packed"]
        codes = torch.stack([words >> 4 * i & 15 for i in range(8)], 2).flatten(1)
        weight = (codes - 8) * tensors["weight_scale"].double().repeat_interleave(128, 1)
    else:
        weight = tensors["weight"].double() * tensors.get("weight_scale", torch.ones(1)).double()
    assert torch.equal(weight, problem.weight)


@pytest.mark.e2e
@pytest.mark.usefixtures("tiny_cache")
def test_vllm_runs_layers_in_a_process_of_its_own() -> None:
    needs_vllms_4_bit_kernel()
    process = Vllm(replace(STOCK, variables=tuple(W4A16.items())))
    try:
        problem = SCHEMES["w4"].problem(256, 512)
        contestant = RemoteContender(process, "wna16", problem, 0.02)
        contest.check(contestant, problem)
        x = problem.activations(2)
        contestant.warm_up(x)
        assert all(t.wall > 0 for t in contestant.turn(x, 0))
        with pytest.raises(CannotRunError, match="uint3b4"):
            RemoteContender(process, "wna16", SCHEMES["w3"].problem(256, 512), 0.02)
    finally:
        process.close()


def test_tokens_are_counted_while_all_streams_decode() -> None:
    early = Stream(((1.0, 1), (2.0, 11), (3.0, 21)))
    late = Stream(((2.0, 1), (4.0, 21)))
    # Between 2 s and 3 s: 10 tokens of the one, half of 20 of the other.
    assert workload.decode_rate([early, late]) == pytest.approx(20.0)


def test_streams_that_never_decode_together_have_no_rate() -> None:
    with pytest.raises(ValueError, match="no time"):
        workload.decode_rate([Stream(((1.0, 1), (2.0, 9))), Stream(((3.0, 1), (4.0, 9)))])


def test_prompts_share_no_prefix() -> None:
    asked = [*workload.prompts(16, 32, 5000, 1), *workload.prompts(16, 32, 5000, 2)]
    assert len({tuple(prompt[:4]) for prompt in asked}) == len(asked)
    assert workload.prompts(2, 8, 5000, 3) == workload.prompts(2, 8, 5000, 3)


def test_memory_of_grandchildren_is_seen() -> None:
    child = "b = bytearray(80 << 20); b[::4096] = b'x' * len(b[::4096]); import time; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with memory.watched_children() as peak:
        subprocess.run([sys.executable, "-c", parent], check=True)
    assert 80 << 20 <= peak.bytes < 200 << 20


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("compressed_linear::linear", [[1, 640], [64, 81920]], step_worker.LINEARS),
        ("compressed_linear::linear", [[1, 640], [16384, 20480]], step_worker.HEAD),
        ("_C::onednn_mm", [[1, 262144], [1, 640]], step_worker.HEAD),
        ("_C::cpu_attention_with_kv_cache", [[1, 4, 256]], step_worker.ATTENTION),
        ("aten::argmax", [[1, 262144]], step_worker.SAMPLER),
        ("graph_0_cpp_fused_linear_mul_3", [], step_worker.COMPILED),
        ("## Call CompiledFxGraph None ##", [], step_worker.PYTHON),
        ("aten::slice", [[8]], step_worker.OTHER),
    ],
)
def test_operators_are_told_apart(name: str, shapes: list[list[int]], kind: str) -> None:
    assert step_worker.kind(name, shapes, 262144) == kind


def test_a_plan_tells_what_came_from_the_cache(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    layers = [
        {"bytes_prepared": 10, "prepare_seconds": 0.5, "cache": "hit"},
        {"bytes_prepared": 10, "prepare_seconds": 0.25, "cache": "miss"},
        {"bytes_prepared": 0, "prepare_seconds": 0.0, "cache": ""},  # not ours: delegated
    ]
    plan.write_text(json.dumps({"layers": layers}))
    found = vllm_engine.preparation(plan)
    assert found == {"prepare_s": 0.75, "layers": 2, "from_cache": 1}


@pytest.mark.parametrize("name", models.ALL)
def test_engines_are_listed_before_what_they_serve_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(shape: checkpoint.Shape, form: checkpoint.Format, directory: Path) -> None:
        raise AssertionError(f"{directory} is made")

    monkeypatch.setattr(checkpoint, "write", made)
    engines = models.ALL[name].engines
    assert "llama" in engines
    assert {key.removesuffix("-alone") for key in engines} <= set(engines)


class CountingEngine:
    """Answers every request with a token more at each step, the first request twice as fast."""

    def __init__(self) -> None:
        self.left: dict[str, tuple[int, int]] = {}

    def add_request(self, request: str, prompt: dict[str, Any], params: Any) -> None:
        self.left[request] = (0, params.max_tokens)

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        found = []
        for request, (done, wanted) in list(self.left.items()):
            now = min(done + (2 if request == "0" else 1), wanted)
            self.left[request] = (now, wanted)
            if now == wanted:
                del self.left[request]
            output = SimpleNamespace(token_ids=[7] * now)
            found.append(SimpleNamespace(request_id=request, outputs=[output]))
        return found


def test_tokens_of_an_engine_in_this_process_are_counted_by_request() -> None:
    vllm = vllm_worker.VllmInProcess.__new__(vllm_worker.VllmInProcess)
    vllm.engine, vllm.numbers = CountingEngine(), itertools.count()
    fast, slow = vllm.answer([[1, 2], [3, 4]], 4)
    assert [count for _, count in fast.tokens] == [2, 4]
    assert [count for _, count in slow.tokens] == [1, 2, 3, 4]
    assert fast.last < slow.last


def test_a_step_of_an_engine_without_profile_has_its_time_only(tmp_path: Path) -> None:
    runs = {
        "ours": {"name": "A", "ms": {"linears": 1.5, "Python": 2.0}, "wall_ms": 3.5},
        "llama": {"name": "B", "ms": {}, "wall_ms": 9.0},
    }
    about = {"cpu": "C", "vllm": "1", "date": "today"}
    report = {"title": "M", "streams": 1, "steps": 4, "kinds": ["linears", "Python"], "runs": runs}
    file = tmp_path / "step.json"
    file.write_text(json.dumps(report | {"machine": about}))
    assert markdown_models.step(file).splitlines()[:5] == [
        "| ms | A | B |",
        "| --- | ---: | ---: |",
        "| linears | 1.50 |  |",
        "| Python | 2.00 |  |",
        "| step | 3.50 | 9.00 |",
    ]


def test_schemes_stand_next_to_what_vllm_alone_makes_of_the_same_files(tmp_path: Path) -> None:
    def rates(prefill: float, one: float) -> dict[str, object]:
        return {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": {"1": one}}

    failed = "vLLM, nvfp4 ended with 1: ValueError: no kernel"
    engines = {
        "ours-fp8-alone": rates(600.0, 40.0) | {"kernels": {"cpu (avx2)": 72}},
        "vllm-fp8-alone": rates(150.0, 16.0) | {"selected": ["TorchFp8"]},
        "ours-nvfp4-alone": rates(500.0, 50.0) | {"kernels": {"cpu (avx2)": 72}},
        "vllm-nvfp4-alone": {"error": failed},
    }
    about = {"cpu": "C", "vllm": "1", "torch": "2", "date": "today"}
    sizes = {"prefill_tokens": 512, "short_prompt": 32, "output_tokens": 8}
    file = tmp_path / "schemes.json"
    file.write_text(json.dumps({"title": "M", "engines": engines, "machine": about} | sizes))
    assert markdown_models.schemes(file).splitlines()[2:4] == [
        "| fp8 | 72 × cpu (avx2) | 600 (×4) | 40 (×2.5) | TorchFp8 |",
        "| nvfp4 | 72 × cpu (avx2) | 500 | 50 | does not start: ValueError: no kernel |",
    ]


def test_the_last_exception_of_a_log_is_the_reason() -> None:
    log = "INFO Selected Abc for X\nOSError: first\n[rank0]: ValueError: Failed: \n  rest\n"
    assert vllm_engine.last_error(log) == "ValueError: Failed:"
    assert vllm_engine.last_error("INFO all is well") == ""
    assert vllm_engine.selected(log) == ["Abc"]


SMALL = checkpoint.Shape(256, 512, 2, 4, 2, 1024, False)


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Of one prompt, by each format's checkpoint."""
    found = {}
    for name, form in checkpoint.FORMATS.items():
        directory = tmp_path_factory.mktemp(name)
        checkpoint.write(SMALL, form, directory)
        with loaded(directory, form.dtype) as model:
            found[name] = model_logits(model, torch.arange(8)[None])
    return found


@pytest.mark.parametrize("name", checkpoint.FORMATS)
def test_synthetic_checkpoints_load_and_stay_finite(
    name: str, logits: dict[str, torch.Tensor]
) -> None:
    assert torch.isfinite(logits[name]).all()
    assert 0.01 < float(logits[name].std()) < 100


def test_formats_of_four_bits_hold_the_same_weights(logits: dict[str, torch.Tensor]) -> None:
    size = logits["gptq"].abs().max()
    assert (logits["gptq"] - logits["awq"]).abs().max() <= 0.02 * size
    assert (logits["gptq"] - logits["w4a16"]).abs().max() <= 0.05 * size  # scales are bf16


def test_files_name_every_tensor_once(tmp_path: Path) -> None:
    checkpoint.write(SMALL, checkpoint.FORMATS["gptq"], tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert set(index["weight_map"].values()) == {p.name for p in tmp_path.glob("*.safetensors")}
    tensors = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert 0.9 * tensors < index["metadata"]["total_size"] < tensors


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (llama_file.q4_0, gguf.GGMLQuantizationType.Q4_0),
        (llama_file.q8_0, gguf.GGMLQuantizationType.Q8_0),
    ],
)
def test_gguf_blocks_have_the_variance_of_one_input(make, kind) -> None:
    weights = gguf.dequantize(make(256, 1024), kind)
    assert weights.shape == (256, 1024)
    assert np.std(weights) * 1024**0.5 == pytest.approx(1.0, abs=0.15)


def test_gguf_file_has_the_tensors_of_a_llama(tmp_path: Path) -> None:
    llama_file.write_llama(SMALL, tmp_path / "model.gguf")
    found = {t.name: tuple(t.shape) for t in GGUFReader(tmp_path / "model.gguf").tensors}
    assert found["token_embd.weight"] == (256, 1024)
    assert found["blk.1.ffn_down.weight"] == (512, 256)
    assert found["blk.0.attn_k.weight"] == (256, 128)
    assert len(found) == 3 + 2 * 9
