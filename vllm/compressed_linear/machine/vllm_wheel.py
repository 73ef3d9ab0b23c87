# SPDX-License-Identifier: Apache-2.0
"""Operators of vLLM's CUDA wheel that this package calls.

A platform that is made by hand, such as ``cuda:90``, is assumed to have all of them. With an
installed GPU the loaded library is asked. vLLM's kernel classes decide which operators run on which
compute capability.
"""

from __future__ import annotations

CUDA_WHEEL = "vLLM 0.33.0"
"""The release whose wheel (x86-64, CUDA) the names were read from."""

CUDA_OPS: frozenset[str] = frozenset(
    f"_C::{name}"
    for name in (
        "cutlass_encode_and_reorder_int4b",
        "cutlass_pack_scale_fp8",
        "cutlass_scaled_fp4_mm",
        "cutlass_scaled_mm",
        "cutlass_scaled_mm_azp",
        "cutlass_w4a8_mm",
        "dynamic_per_token_scaled_fp8_quant",
        "dynamic_scaled_fp8_quant",
        "dynamic_scaled_int8_quant",
        "gptq_gemm",
        "gptq_marlin_repack",
        "gptq_shuffle",
        "machete_mm",
        "machete_prepack_B",
        "marlin_gemm",
        "per_token_group_fp8_quant",
        "scaled_fp4_quant",
        "static_scaled_fp8_quant",
        "static_scaled_int8_quant",
    )
)
