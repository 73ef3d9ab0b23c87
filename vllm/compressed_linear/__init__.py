# SPDX-License-Identifier: Apache-2.0
"""Compressed linear layers: any quantized checkpoint format on any kernel."""

from vllm.compressed_linear.backends.base import Capabilities, QuantLinearMethod, Verdict
from vllm.compressed_linear.backends.registry import register_backend, unregister_backend
from vllm.compressed_linear.checkpoint.weights import CompressedWeights, to_standard_layout
from vllm.compressed_linear.checkpoint.write import from_standard_layout
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import CompressedLinearDescriptor
from vllm.compressed_linear.spec.scheme import StandardWeights

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
