# SPDX-License-Identifier: Apache-2.0
"""GPUs, and a case of each kind of weight for vLLM's kernel classes on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vllm.compressed_linear.backends.vllm_native.classes import tables
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import E2M1, E4M3, INT8, uint
from vllm.compressed_linear.testing.oracle import Case

A100, H100 = Platform.parse("cuda:80"), Platform.parse("cuda:90")
MARLIN, MACHETE = "MarlinLinearKernel", "MacheteLinearKernel"

needs_classes = pytest.mark.skipif(
    tables.unavailable("mixed precision") is not None,
    reason="this vLLM has no kernel classes that are known here",
)


def symmetric(bits: int) -> Any:
    return uint(bits, 1 << (bits - 1))


INT4 = Case(symmetric(4), 128, 256, 128, scale_dtype="bfloat16")
FP8 = Case(E4M3, 128, 256, -1, scale_dtype="float32")
NVFP4 = Case(E2M1, 128, 256, 16, scale_dtype="float8_e4m3fn", row_scale="tensor")
MX = Case(E2M1, 128, 256, 32, scale_dtype="e8m0")
TOKEN = ActivationSpec(INT8, True, "token")
STATIC = replace(TOKEN, dynamic=False, granularity="tensor")
FP8_TOKEN = ActivationSpec(E4M3, True, "token", maximum=448.0)
FP8_TENSOR = replace(FP8_TOKEN, granularity="tensor")
W8A8 = Case(symmetric(8), 128, 256, -1, scale_dtype="float32", activation=TOKEN)
FP8_W8A8 = replace(W8A8, element=E4M3)
