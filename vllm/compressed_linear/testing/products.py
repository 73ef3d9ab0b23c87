# SPDX-License-Identifier: Apache-2.0
"""Checks of ``apply``: batch sizes, shapes and strides of x, independence of tokens."""

from __future__ import annotations

import math

import torch

from vllm.compressed_linear.testing.run import Run, Tensors, same_bits

ROWS = (0, 1, 2, 3, 16, 17, 64, 257)
"""Batch sizes M: 0, single tokens, odd sizes, sizes of tiles and one more."""


def check_batch_sizes(run: Run, tensors: Tensors, rows: tuple[int, ...]) -> None:
    """Results for every M of ``rows``, and for an x of zeros."""
    for count in rows:
        x = run.problem.activations(count)
        out = run.apply(f"M={count}", tensors, x, run.problem.bias)
        run.compare(f"M={count}", out, x, run.problem.bias)
    x = torch.zeros_like(run.problem.activations(5))
    out = run.apply("x of zeros", tensors, x, run.problem.bias)
    run.compare("x of zeros", out, x, run.problem.bias)


def check_forms(run: Run, tensors: Tensors) -> None:
    """x in every shape and stride of models, and a call without the bias."""
    x, bias = run.problem.activations(6), run.problem.bias
    k = x.shape[1]
    forms = {
        "x [K]": x[0],
        "x [2, 3, K]": x.reshape(2, 3, k),
        "x [2, 0, K]": x.new_empty(2, 0, k),
        "x [1, 1, 6, K]": x.reshape(1, 1, 6, k),
        "x with padded rows": torch.nn.functional.pad(x, (3, 5), value=math.nan)[:, 3 : 3 + k],
        "x with every other row": torch.repeat_interleave(x, 2, 0)[::2],
        "x transposed": x.t().contiguous().t(),
        "x with every other channel": torch.repeat_interleave(x, 2, 1)[:, ::2],
        "x expanded": x[:1].expand(4, k),
        "x [3, 2, K] transposed": x.reshape(3, 2, k).transpose(0, 1),
        "x at an odd address": _shifted(x),
    }
    for check, form in forms.items():
        run.compare(check, run.apply(check, tensors, form, bias), form, bias)
    if bias is not None:
        check = "bias held back"
        run.compare(check, run.apply(check, tensors, x, None), x, None)


def check_isolation(run: Run, tensors: Tensors) -> None:
    """Infinities or NaN in one token may affect only its own result."""
    for bad in (math.nan, math.inf):
        check = f"one row of {bad}"
        x = run.problem.activations(17)
        x[0] = bad
        out = run.apply(check, tensors, x, run.problem.bias)
        run.compare(check, out, x, run.problem.bias, slice(1, None))


def check_invariance(run: Run, tensors: Tensors) -> None:
    """Batch invariance: the bits of a row do not depend on the other rows."""
    x, bias = run.problem.activations(ROWS[-1]), run.problem.bias
    whole = run.apply("batch invariance", tensors, x, bias)
    for count in (1, 2, 3, 16, 17, 64):
        for start in (0, 5, ROWS[-1] - count):
            rows = slice(start, start + count)
            part = run.apply("batch invariance", tensors, x[rows].contiguous(), bias)
            if whole is not None and part is not None and not same_bits(part, whole[rows]):
                run.fail("batch invariance", f"rows [{start}, {start + count}) alone differ")


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element after an aligned address."""
    memory = x.new_zeros(x.numel() + 1)
    memory[1:] = x.flatten()
    return memory[1:].view(x.shape)
