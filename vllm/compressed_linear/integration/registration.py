# SPDX-License-Identifier: Apache-2.0
"""Registration with vLLM: quantization name, environment variables, compile factor."""

from __future__ import annotations

from vllm.compressed_linear import settings
from vllm.compressed_linear.integration import compat


def register_with_vllm() -> None:
    """Register everything. Idempotent.

    Raises ``ImportError`` if vLLM is absent or its version is not supported.
    """
    compat.check_vllm()
    from vllm.compressed_linear.formats.base import mlx_configuration
    from vllm.compressed_linear.formats.registry import format_of
    from vllm.compressed_linear.integration import compat_loading
    from vllm.compressed_linear.integration.completeness import load_and_check
    from vllm.compressed_linear.integration.config import NAME, CompressedLinearConfig
    from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

    compat.register_config(NAME, CompressedLinearConfig)
    compat.accept_configurations(
        lambda config: format_of(config) is not None,
        lambda config: mlx_configuration(vars(config)),
    )
    compat_loading.call_around_loading(load_and_check)
    compat.announce_variables(settings.VARIABLES)
    compat.publish_compile_factor("VLLM_COMPRESSED_LINEAR_PLAN", PROCESS_PLAN.fingerprint)
