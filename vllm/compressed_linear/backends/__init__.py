# SPDX-License-Identifier: Apache-2.0
"""The backends that come with this package. They know descriptors and layouts, never formats."""


def register_all() -> None:
    """Register the backends that come with this package (idempotent)."""
    from vllm.compressed_linear.backends import (
        cpu,
        cpu_int8,
        marlin,
        reference,
        triton,
        vllm_native,
    )
    from vllm.compressed_linear.registry import register_backend

    for backend in (
        cpu.CpuBackend,
        cpu_int8.CpuInt8Backend,
        cpu_int8.CpuInt8FastBackend,
        marlin.MarlinBackend,
        triton.TritonBackend,
        vllm_native.VllmNativeBackend,
        reference.ReferenceBackend,
    ):
        register_backend(backend)
