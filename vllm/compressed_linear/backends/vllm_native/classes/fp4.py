# SPDX-License-Identifier: Apache-2.0
"""vLLM's classes for NVFP4 and MX weights: how they are configured."""

from __future__ import annotations


def nvfp4_config() -> object:
    """vLLM's ``NvFp4LinearLayerConfig``."""
    from vllm.model_executor.kernels.linear import NvFp4LinearLayerConfig

    return NvFp4LinearLayerConfig()


def mxfp4_config() -> object:
    """vLLM's ``MxFp4LinearLayerConfig`` for x that is not quantized."""
    from vllm.model_executor.kernels.linear import MxFp4LinearLayerConfig

    return MxFp4LinearLayerConfig()


def mxfp8_config(n: int, k: int) -> object:
    """vLLM's ``Mxfp8LinearLayerConfig`` of a weight [n, k]."""
    from vllm.model_executor.kernels.linear import Mxfp8LinearLayerConfig

    return Mxfp8LinearLayerConfig(weight_shape=(n, k))
