# SPDX-License-Identifier: Apache-2.0
"""Operators of vLLM's CUDA wheel on a machine that has none: with the wheel's own schemas, checks
of what they are given, and what they compute written in plain torch."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.support.cutlass_doubles import (
    cutlass_scaled_mm,
    cutlass_scaled_mm_azp,
    dynamic_per_token_scaled_fp8_quant,
    dynamic_scaled_fp8_quant,
    dynamic_scaled_int8_quant,
    per_token_group_fp8_quant,
    static_scaled_fp8_quant,
    static_scaled_int8_quant,
)
from tests.support.marlin_doubles import (
    gptq_marlin_repack,
    machete_mm,
    machete_prepack,
    marlin_gemm,
)

SCHEMAS: dict[str, str] = json.loads(
    (Path(__file__).parent / "data" / "vllm_cuda_ops.json").read_text()
)["schemas"]
CALLED: list[str] = []
"""Names of the operators that ran, in order."""
_DEFINED: dict[str, Any] = {}


def install(functions: dict[str, Callable[..., Any]] | None = None) -> None:
    """Define what this process's vLLM does not have; each once. ``functions``: name of the operator
    → what it computes, those of this file if it is None."""
    from vllm import _custom_ops  # noqa: F401  # whatever vLLM has is there after this

    for name, function in (functions or _IMPLEMENTED).items():
        if name in _DEFINED:
            continue
        packet = name.partition(".")[0]
        known = getattr(torch.ops._C, packet, None)
        # The CPU wheel has a few names without arguments, for what it never calls.
        bare = known is not None and not known.default._schema.arguments
        if known is not None and not bare:
            continue
        home = torch.library.Library("vllm_cuda_wheel" if bare else "_C", "FRAGMENT")
        home.define(SCHEMAS[name])
        home.impl(name, _recorded(packet, function), "CompositeExplicitAutograd")
        _DEFINED[name] = home
        if bare:
            setattr(torch.ops._C, packet, getattr(torch.ops.vllm_cuda_wheel, packet))


def _recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        CALLED.append(name)
        return function(*arguments, **named)

    return run


@contextmanager
def every_call() -> Iterator[None]:
    """vLLM's wrapping custom op taken out of the way, so that ``marlin_gemm`` is reached with fake
    tensors as well."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    real = torch.ops.vllm.marlin_gemm
    torch.ops.vllm.marlin_gemm = marlin_utils._marlin_gemm
    try:
        yield
    finally:
        torch.ops.vllm.marlin_gemm = real


_IMPLEMENTED: dict[str, Callable[..., Any]] = {
    "gptq_marlin_repack": gptq_marlin_repack,
    "marlin_gemm": marlin_gemm,
    "machete_prepack_B": machete_prepack,
    "machete_mm": machete_mm,
    "dynamic_scaled_int8_quant": dynamic_scaled_int8_quant,
    "static_scaled_int8_quant": static_scaled_int8_quant,
    "dynamic_per_token_scaled_fp8_quant": dynamic_per_token_scaled_fp8_quant,
    "dynamic_scaled_fp8_quant": dynamic_scaled_fp8_quant,
    "static_scaled_fp8_quant": static_scaled_fp8_quant,
    "per_token_group_fp8_quant": per_token_group_fp8_quant,
    "cutlass_scaled_mm": cutlass_scaled_mm,
    "cutlass_scaled_mm_azp": cutlass_scaled_mm_azp,
}
