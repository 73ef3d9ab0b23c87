# SPDX-License-Identifier: Apache-2.0
"""Checks of ``embedding``: lookup of rows of the weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from vllm.compressed_linear.backends.contract import lookup_bound
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.testing.run import Run, Tensors, same_bits, shape_of


def check_lookup(run: Run, tensors: Tensors, platform: Platform) -> bool:
    """Look up rows if the backend supports it; returns whether it does."""
    asked = replace(run.descriptor, lookup=True)
    check = "can_implement with lookup"
    verdict = run.attempt(check, lambda: run.backend.can_implement(asked, platform))
    if not verdict:
        return False
    if not run.backend.capabilities.lookup:
        run.fail(check, "accepted what its capabilities do not declare")
    n = asked.n
    every = torch.arange(n, device=run.problem.weight.device)
    forms = {
        "ids [N]": every,
        "ids of nothing": every[:0],
        "ids [2, 3]": (torch.arange(6, device=every.device) * 7 % n).reshape(2, 3),
        "one id often": every[-1:].expand(20),
        "every other id": every[::2],
    }
    whole = None
    for check, ids in forms.items():
        rows = check_rows(run, check, asked, tensors, ids)
        whole = rows if whole is None else whole
        if rows is not None and whole is not None and not same_bits(rows, whole[ids]):
            run.fail(check, "a row has other bits than beside all others")
    return True


def check_rows(
    run: Run,
    check: str,
    descriptor: CompressedLinearDescriptor,
    tensors: Tensors,
    ids: torch.Tensor,
    look_up: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """Look up ``ids`` with a new instance (or ``look_up``) and compare the rows with ŵ."""
    call = look_up or functools.partial(run.backend(descriptor).embedding, tensors)
    out = run.attempt(check, lambda: call(ids))
    if out is None:
        return None
    shape = (*ids.shape, descriptor.in_features)
    dtype = torch_dtype(descriptor.output_dtype)
    if not isinstance(out, torch.Tensor) or out.shape != shape or out.dtype != dtype:
        run.fail(check, f"gave {shape_of(out)}, expected {dtype} of shape {list(shape)}")
        return None
    if out.numel():
        expected = run.problem.weight[ids.flatten()]
        allowed = lookup_bound(
            run.problem.magnitude[ids.flatten()],
            expected,
            descriptor.output_dtype,
            run.backend.contract(descriptor),
        )
        run.compare_with(check, out.reshape(-1, shape[-1]), expected, allowed)
    return out
