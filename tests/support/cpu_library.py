# SPDX-License-Identifier: Apache-2.0
"""What this processor can run, and tensors as the compiled library wants them."""

from __future__ import annotations

import torch

from vllm.compressed_linear.machine import native

ISAS = native.supported_isas("floats") if native.available() is None else []
"""Instruction sets this processor can run, best first; empty without the native library."""


ISAS_INT8 = native.supported_isas("integers") if native.available() is None else []
"""The same for integer activations."""


def tiled(values: torch.Tensor) -> torch.Tensor:
    """[N, G] → [tiles, G, 16], as the ops want scales and zero points."""
    missing = -len(values) % native.TILE
    padded = torch.nn.functional.pad(values, (0, 0, 0, missing))
    return padded.unflatten(0, (-1, native.TILE)).transpose(1, 2).contiguous()
