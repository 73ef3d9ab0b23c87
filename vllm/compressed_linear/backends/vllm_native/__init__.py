# SPDX-License-Identifier: Apache-2.0
"""vLLM's own kernel classes, run from a descriptor.

Whatever vLLM has is one candidate among others, for every checkpoint format and with every reason
why not. A class that is not wired is listed in the reasons. Each class of vLLM's is an entry of
``table.py``, and the first of them, in vLLM's own order of preference, that takes a descriptor is
the one that runs it. ``classes`` holds every private name of vLLM's.

On a GPU nothing of this has run yet: what was checked, and how, is in docs/gpu.md.
"""

from vllm.compressed_linear.backends.vllm_native.backend import VllmNativeBackend
from vllm.compressed_linear.backends.vllm_native.cpu import CPU_KERNEL, CPU_OP
from vllm.compressed_linear.backends.vllm_native.op import CALLS

__all__ = ["CALLS", "CPU_KERNEL", "CPU_OP", "VllmNativeBackend"]
