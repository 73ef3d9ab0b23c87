# SPDX-License-Identifier: Apache-2.0
"""vLLM's own kernel classes, run from a descriptor.

vLLM's kernels are one candidate for every checkpoint format, with all reasons if they decline. A
class without an adapter is listed in the reasons. ``table.py`` has the adapters; the first one, in
vLLM's own order of preference, that accepts a descriptor runs it. ``classes`` has all private names
of vLLM.

Untested on GPUs: docs/gpu.md says what was checked, and how.
"""

from vllm.compressed_linear.backends.vllm_native.backend import VllmNativeBackend
from vllm.compressed_linear.backends.vllm_native.cpu import CPU_KERNEL, CPU_OP
from vllm.compressed_linear.backends.vllm_native.op import CALLS

__all__ = ["CALLS", "CPU_KERNEL", "CPU_OP", "VllmNativeBackend"]
