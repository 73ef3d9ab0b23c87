# SPDX-License-Identifier: Apache-2.0
"""Entry point of the group ``vllm.general_plugins``. Runs in every process, perhaps twice."""

from __future__ import annotations


def register() -> None:
    """Register the quantization name ``compressed_linear`` unless VLLM_COMPRESSED_LINEAR=0."""
    from vllm.compressed_linear import settings

    if not settings.enabled():
        return
    from vllm.compressed_linear import compat

    compat.check_vllm()
    from vllm.compressed_linear.config import NAME
    from vllm.compressed_linear.formats.unquantized import UnquantizedConfig
    from vllm.compressed_linear.plan import PLAN

    # vLLM calls it without arguments where config.json has no quantization_config; otherwise it
    # calls from_config, which dispatches to the format.
    compat.register_config(NAME, UnquantizedConfig)
    compat.announce_variables(settings.VARIABLES)
    compat.publish_compile_factor("VLLM_COMPRESSED_LINEAR_PLAN", PLAN.fingerprint)
