# SPDX-License-Identifier: Apache-2.0
"""Quantization methods that this package does not read: what each is, and what runs it.

The names are those of ``quant_method``. What vLLM has is true of 0.32 and 0.33.
"""

from __future__ import annotations

from typing import Any

from vllm.compressed_linear.formats.base import quant_method_of

_NOT_VLLM = "vLLM has no code for it"
_PACKAGE = "transformers runs it with the package"
_METHODS = {
    "aqlm": ("AQLM, sums of codebooks of vectors", f"{_NOT_VLLM}; {_PACKAGE} aqlm"),
    "bitnet": ("BitNet, ternary weights", f"{_NOT_VLLM}; transformers and bitnet.cpp run it"),
    "eetq": ("EETQ, int8 per channel", f"{_NOT_VLLM}; {_PACKAGE} kernels"),
    "exl2": ("ExLlamaV2, mixed widths", f"{_NOT_VLLM}; exllamav2 runs it on NVIDIA GPUs"),
    "exl3": ("ExLlamaV3, trellis codes", f"{_NOT_VLLM}; exllamav3 runs it on NVIDIA GPUs"),
    "fp_quant": (
        "FP-Quant, MXFP4 or NVFP4 of rotated weights",
        f"{_PACKAGE} fp_quant, vLLM with --allow-deprecated-quantization on GPUs from 10.0 on",
    ),
    "gguf": ("GGUF, the files of llama.cpp", "llama.cpp runs it, and vLLM with vllm-gguf-plugin"),
    "higgs": ("HIGGS, codebooks of vectors", f"{_NOT_VLLM}; {_PACKAGE} flute-kernel"),
    "hqq": ("HQQ, integers with zero points in floats", f"{_NOT_VLLM}; {_PACKAGE} hqq"),
    "quanto": ("Quanto", f"{_NOT_VLLM}; {_PACKAGE} optimum-quanto"),
    "qvq": ("of a GPTQModel with methods of its own", f"{_NOT_VLLM}; what wrote it runs it"),
    "spqr": ("SpQR, with sparse outliers", f"{_NOT_VLLM}; {_PACKAGE} spqr_quant"),
    "torchao": ("torchao, subclasses of tensors", "vLLM runs it with the package torchao"),
    "vptq": ("VPTQ, codebooks of vectors", f"{_NOT_VLLM}; {_PACKAGE} vptq"),
}


def what_runs(config: dict[str, Any]) -> str:
    """What a ``quantization_config`` is and what runs it; "" if that is not known here."""
    name = quant_method_of(config)
    kind, runs = _METHODS.get(name, ("", ""))
    return f"{name} ({kind}) is not read here: {runs}" if kind else ""
