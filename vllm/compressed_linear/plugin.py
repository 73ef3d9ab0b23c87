# SPDX-License-Identifier: Apache-2.0
"""Entry point of the group ``vllm.general_plugins``. Runs in every process, perhaps twice."""

from __future__ import annotations


def register() -> None:
    """Register the quantization name ``compressed_linear`` unless VLLM_COMPRESSED_LINEAR=0."""
    from vllm.compressed_linear import settings

    if not settings.enabled():
        return
    from vllm.compressed_linear.integration.registration import register_with_vllm

    register_with_vllm()
