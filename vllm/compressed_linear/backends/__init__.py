# SPDX-License-Identifier: Apache-2.0
"""The backends that come with this package. They know descriptors and layouts, never formats."""


def register_all() -> None:
    """Register the backends that come with this package (idempotent)."""
    from vllm.compressed_linear.backends import reference, vllm_native
    from vllm.compressed_linear.backends.cpu import int8, weight_only
    from vllm.compressed_linear.backends.marlin import backend as marlin
    from vllm.compressed_linear.backends.registry import register_backend
    from vllm.compressed_linear.backends.triton import backend as triton

    for backend in (
        weight_only.CpuBackend,
        int8.CpuInt8Backend,
        int8.CpuInt8FastBackend,
        marlin.MarlinBackend,
        triton.TritonBackend,
        vllm_native.VllmNativeBackend,
        reference.ReferenceBackend,
    ):
        register_backend(backend)
