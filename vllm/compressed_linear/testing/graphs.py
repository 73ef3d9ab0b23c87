# SPDX-License-Identifier: Apache-2.0
"""Checks of captured and compiled calls: CUDA graphs and torch.compile."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from vllm.compressed_linear.machine import timing
from vllm.compressed_linear.testing.lookups import check_rows
from vllm.compressed_linear.testing.run import Run, Tensors, same_bits


def check_cuda_graph(run: Run, tensors: Tensors) -> None:
    """A replayed CUDA graph of ``apply`` computes new results for a new x."""
    method, bias = run.backend(run.descriptor), run.problem.bias
    for count in (1, 17, 64):
        check = f"CUDA graph, M={count}"
        x = run.problem.activations(count)
        held = torch.zeros_like(x)
        out: list[torch.Tensor] = []

        def call(_: int, held: torch.Tensor = held, out: list[torch.Tensor] = out) -> None:
            out[:] = [method.apply(tensors, held, bias)]

        graph = run.attempt(check, functools.partial(timing.captured, call, 1))
        if graph is None:
            return
        held.copy_(x)
        # Twice, since state that a call leaves behind must not change the next.
        graph.replay()
        once = out[0].clone()
        graph.replay()
        run.compare(check, once, x, bias)
        if not same_bits(out[0], once):
            run.fail(check, "replayed twice, gave two answers")


def check_compiled(run: Run, tensors: Tensors) -> None:
    """torch.compile traces ``apply`` in one graph that serves every M."""
    method, bias = run.backend(run.descriptor), run.problem.bias

    def call(x: torch.Tensor) -> torch.Tensor:
        return method.apply(tensors, x, bias)

    # The limit of recompilations is per code object, and every case traces this one.
    torch.compiler.reset()
    traced = torch.compile(call, fullgraph=True, backend="eager")
    for count in (5, 2, 64, 257):
        x = run.problem.activations(count)
        torch._dynamo.mark_dynamic(x, 0)
        check = f"torch.compile, M={count}"
        stance = "default" if count == 5 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            out = run.attempt(check, functools.partial(traced, x))
        run.compare(check, out, x, bias)


def check_compiled_lookup(run: Run, tensors: Tensors) -> None:
    """torch.compile traces ``embedding`` in one graph that serves any number of ids."""
    asked = replace(run.descriptor, lookup=True)
    method = run.backend(asked)
    torch.compiler.reset()
    traced = torch.compile(
        lambda ids: method.embedding(tensors, ids), fullgraph=True, backend="eager"
    )
    for count in (5, 2, 64):
        ids = torch.arange(count, device=run.problem.weight.device) % asked.n
        torch._dynamo.mark_dynamic(ids, 0)
        with torch.compiler.set_stance("default" if count == 5 else "fail_on_recompile"):
            check_rows(run, f"torch.compile, {count} ids", asked, tensors, ids, traced)
