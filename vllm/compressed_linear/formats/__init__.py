# SPDX-License-Identifier: Apache-2.0
"""Checkpoint formats. One file each; they know configurations and layouts, never kernels."""


def register_all() -> None:
    """Import the formats that come with this package, which registers them (idempotent)."""
    from vllm.compressed_linear.formats import (  # noqa: F401
        auto_round,
        awq,
        compressed_tensors,
        gptq,
        unquantized,
    )
