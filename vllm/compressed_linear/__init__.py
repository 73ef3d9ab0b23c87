# SPDX-License-Identifier: Apache-2.0
"""Compressed linear layers: any quantized checkpoint format on any kernel."""

from vllm.compressed_linear.backend import Capabilities, QuantLinearMethod, Verdict
from vllm.compressed_linear.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.layout import StandardWeights
from vllm.compressed_linear.platform import Platform
from vllm.compressed_linear.registry import register_backend, unregister_backend
from vllm.compressed_linear.weights import (
    CompressedWeights,
    from_standard_layout,
    to_standard_layout,
)

__all__ = [
    "Capabilities",
    "CompressedLinearDescriptor",
    "CompressedWeights",
    "Platform",
    "QuantLinearMethod",
    "StandardWeights",
    "Verdict",
    "from_standard_layout",
    "register_backend",
    "to_standard_layout",
    "unregister_backend",
]
