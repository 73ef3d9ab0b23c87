# SPDX-License-Identifier: Apache-2.0
"""What stock vLLM can do on this machine."""

from __future__ import annotations

import pytest
import torch

from vllm.compressed_linear.backends.vllm_native.classes.operators import missing_op
from vllm.compressed_linear.backends.vllm_native.cpu import CPU_OP
from vllm.compressed_linear.machine.platform import Platform

W4A16 = {"VLLM_CPU_INT4_W4A8": "0"}
"""Environment in which vLLM's own 4-bit layers take x as it is. On a CPU with AMX they quantize
bfloat16 x to 8 bits by default, elsewhere this changes nothing."""


def fp32_options(family: str) -> dict[str, str]:
    """Options with which vLLM loads a family of ``tests.support.architectures`` in fp32. On a CPU
    with AMX it prefers a class for latent attention that knows bfloat16 alone, and takes the other
    where it is named."""
    latent = family.endswith("-latent-attention") and not torch.accelerator.is_available()
    return {"attention_backend": "CPU_MLA"} if latent else {}


def needs_vllms_4_bit_kernel() -> None:
    """Skips the test where this CPU's library of vLLM has none, as that for AVX2."""
    if (lacks := missing_op(CPU_OP, Platform.detect())) is not None:
        pytest.skip(lacks)
