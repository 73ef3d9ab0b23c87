# SPDX-License-Identifier: Apache-2.0
"""Profiles decode steps of one vLLM, with everything of it in this process.

    python -m benchmarks.serving.step_worker MODEL STREAMS QUANTIZATION    JSON on stdout

Scheduler, worker and model are in one process and thread here, so a step is all of its work one
after the other. Wall time is that of steps that are not profiled; operators
are counted by their own time, without what they call; the rest of the wall time is Python.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.serving.vllm_worker import VllmInProcess
from benchmarks.serving.workload import CONTEXT, SHORT_PROMPT, prompts

WARM_STEPS, STEPS = 16, 48
LINEARS, HEAD, ATTENTION = "linears", "lm_head", "attention and KV cache"
SAMPLER, COMPILED, OTHER, PYTHON = "sampler", "compiled pointwise kernels", "other ops", "Python"
KINDS = (LINEARS, HEAD, ATTENTION, SAMPLER, COMPILED, OTHER, PYTHON)
TILE = 16
"""Output channels of one row of a packed weight."""
LINEAR_OPS = ("linear", "onednn_mm", "onednn_scaled_mm", "gemm", "addmm", "aten::mm", "scaled_mm")
COMPILED_KERNELS = ("graph_", "cpp_")
"""How inductor names its kernels; the names go on with those of the operators they replace."""
PYTHON_CALLS = ("##", "Pregraph", "Torch-Compiled", "TorchDynamo")
ATTENTION_OPS = ("attention", "reshape_and_cache", "attn")


def kind(name: str, shapes: Sequence[Sequence[int]], vocabulary: int) -> str:
    """What an operator does for the step, from its name and the shapes of its inputs."""
    sizes = [size for shape in shapes for size in shape]
    whole = any(size in (vocabulary, vocabulary // TILE) for size in sizes)
    if name.startswith(COMPILED_KERNELS):
        return COMPILED
    if name.startswith(PYTHON_CALLS):
        return PYTHON
    if any(part in name for part in ATTENTION_OPS):
        return ATTENTION
    if any(part in name for part in LINEAR_OPS):
        return HEAD if whole else LINEARS
    return SAMPLER if whole else OTHER


def steps(engine: Any, count: int) -> list[float]:
    """Seconds of each of the next steps."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    model, streams, quantization = sys.argv[1], int(sys.argv[2]), sys.argv[3] or None
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing vLLM prints is taken for the answer
    torch._inductor.config.cpp.enable_kernel_profile = True
    vllm = VllmInProcess(model, quantization)
    engine, vocabulary = vllm.engine, vllm.vocabulary
    for prompt in prompts(streams, SHORT_PROMPT, vocabulary, 1):
        vllm.add(prompt, CONTEXT // 2)
    steps(engine, WARM_STEPS)
    wall = statistics.median(steps(engine, STEPS)) * 1e3
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        steps(engine, STEPS)
    spent: defaultdict[str, float] = defaultdict(float)
    by_name: defaultdict[str, float] = defaultdict(float)
    for event in profiler.events():
        milliseconds = event.self_cpu_time_total / 1e3 / STEPS
        found = kind(event.name, event.input_shapes or (), vocabulary)
        spent[found] += milliseconds
        by_name[f"{found}: {event.name}"] += milliseconds
    # Profiling makes Python slower, so its part is what the operators leave of an unprofiled step.
    spent[PYTHON] = max(wall - sum(spent[k] for k in KINDS if k != PYTHON), 0.0)
    most = sorted(by_name.items(), key=lambda item: -item[1])[:20]
    report = {"ms": {k: spent[k] for k in KINDS}, "wall_ms": wall, "most": dict(most)}
    print(json.dumps(report), file=answers, flush=True)


if __name__ == "__main__":
    main()
