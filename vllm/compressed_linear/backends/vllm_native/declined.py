# SPDX-License-Identifier: Apache-2.0
"""vLLM's kernel classes without an adapter: the reasons, and what is missing.

From the sources of vLLM 0.32 and 0.33. A class gets an adapter if its input can be checked on a
machine without a GPU: its operators' arguments against their schemas, its tensors against those of
vLLM's own linear methods. Classes with operators in separate packages have neither. If a class
*with* an adapter computes something else than a descriptor says, the adapter declines.
"""

from __future__ import annotations

UNKNOWN = "vLLM added it after 0.33, and no adapter knows it"
"""The reason of a class that is not listed."""

_PACKAGE = "runs operators of the package {}, which were not checked: {} would have to be"
_EMULATION = "an emulation: it dequantizes all of the weight at every call, {}"
_LIBRARY = "runs operators of vLLM's {} library ({}), whose schemas are not known here"

_OTHER_FP8 = (
    "checked for CUDA only: elsewhere x is quantized by other operators, on gfx942 to another kind "
    "of fp8 (fnuz)"
)

REASONS: tuple[tuple[str, str], ...] = (
    (
        "FlashInferTrtllm",
        _PACKAGE.format("FlashInfer", "how it reorders weights and scales for TensorRT-LLM"),
    ),
    (
        "FlashInferCuteDslNvFp4W4A16",
        _PACKAGE.format("FlashInfer", "how it prepares the weights for 16-bit activations"),
    ),
    ("FlashInfer", _PACKAGE.format("FlashInfer", "its arguments, and how it rounds x and sums")),
    ("Humming", "compiles its kernels in the package humming, whose layouts were not checked"),
    ("B12x", _PACKAGE.format("b12x", "how it packs weights and scales for compute capability 12x")),
    ("Fbgemm", _PACKAGE.format("fbgemm-gpu", "f4f4bf16 and its order of scales")),
    ("Aiter", _PACKAGE.format("aiter", "its arguments, and how it shuffles weights")),
    ("EmulationNvFp4", _EMULATION.format("and rounds it and the quantized x to 16 bits")),
    (
        "EmulationMxfp8",
        "an emulation: it keeps the weight in 16 bits, twice its size, and takes x as it is",
    ),
    ("EmulationMxfp4", _EMULATION.format("with the package amd-quark")),
    ("EmulationMxfp6", _EMULATION.format("with the package amd-quark")),
    ("RDNA3W4A16", _LIBRARY.format("ROCm", "_rocm_C")),
    ("RDNAHybridW4A16", _LIBRARY.format("ROCm", "_rocm_C")),
    ("ROCmFP8", _LIBRARY.format("ROCm", "_rocm_C")),
    (
        "RocmDotScaledMxfp8",
        "Triton kernels for gfx950 only, whose arguments and layouts were not checked",
    ),
    ("XPU", _LIBRARY.format("XPU", "_xpu_C")),
    (
        "BlockWiseTorchFP8",
        "torch's product of blocks on Hopper: in which order it reads scales was not checked",
    ),
    ("RowWiseTorchFP8", _OTHER_FP8),
    ("PerTensorTorchFP8", _OTHER_FP8),
    ("ChannelWiseTorchFP8", _OTHER_FP8),
    ("TritonFp8Block", _OTHER_FP8),
    ("TritonInt8", "checked for CUDA and ROCm only: XPU quantizes x by operators of its own"),
)
"""Beginning of the class's name → the reason, the first that fits. The last few are wired for other
devices than those where the question comes up."""


SINCE_0_33: tuple[tuple[str, str], ...] = (
    ("Rdna3W4A8", _LIBRARY.format("ROCm", "_rocm_C")),
    ("TorchMxFp4", "quantizes x by an operator of vLLM's XPU library, which was not checked"),
    ("TorchMxFp8", "torch's product of MXFP8: in which order it reads scales was not checked"),
)
"""The same for classes that vLLM 0.32 does not have."""


def why(kernel: str) -> str:
    """Why vLLM's class ``kernel`` has no adapter."""
    known = (*REASONS, *SINCE_0_33)
    return next((text for prefix, text in known if kernel.startswith(prefix)), UNKNOWN)
