# SPDX-License-Identifier: Apache-2.0
"""How long a layer takes, estimated: the roofline model, and the calls that a server makes.

An estimate comes from the descriptor, declared constants and the machine's limits, never from a
clock, so the same question always has the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from vllm.compressed_linear.machine.platform import Platform

MIX: dict[int, float] = {
    1: 0.49,
    2: 0.20,
    4: 0.15,
    8: 0.10,
    16: 0.048,
    32: 0.001,
    64: 0.001,
    128: 0.002,
    256: 0.003,
    512: 0.005,
}
"""Share of a server's calls that have M tokens, by which one number is made of the times of all M.

It is that of a chat on a CPU. 256 generated tokens for each prompt, and one prompt is one call, of
512 tokens or fewer; 1 to 16 streams at once, half of the time only one, 3 on average: so 3 calls in
259 are prompts. Counted in time these few calls are about half of the work of 4-bit weights, so
the mix neither forgets them nor lets them decide alone."""


GPU_MIX: dict[int, float] = {
    1: 0.04,
    4: 0.06,
    8: 0.10,
    16: 0.15,
    32: 0.20,
    64: 0.20,
    128: 0.14,
    256: 0.06,
    2048: 0.05,
}
"""The same for a server on a GPU.

It serves many streams at once, since one alone leaves a GPU idle: vLLM lets up to 256 run and fills
every call with prompts up to 2048 tokens. About 50 streams at once, between one and 256, are taken
here; each generates 256 tokens for a prompt of 512, so a call of 2048 tokens serves four prompts,
and there is one to some 20 calls that generate. An assumption about use, not a measurement."""


def mix(device: str) -> Mapping[int, float]:
    """The mix of calls of a server whose layers run on ``device``."""
    return MIX if device == "cpu" else GPU_MIX


def mix_of(sizes: Collection[int]) -> Mapping[int, float]:
    """The mix whose M all are among ``sizes``; ``KeyError`` names one that is missing."""
    found: Mapping[int, float] = GPU_MIX if GPU_MIX.keys() <= set(sizes) else MIX
    for m in found:
        if m not in sizes:
            raise KeyError(str(m))
    return found


def expected_seconds(
    seconds: Callable[[int], float], calls: Mapping[int, float] | None = None
) -> float:
    """Average time of a call under ``calls``, or ``MIX``; ``seconds``: of one with M tokens."""
    return sum(share * seconds(m) for m, share in (calls or MIX).items())


_VECTOR_SHARE_OF_AMX = 0.15


def vector_share(platform: Platform, variant: str, arithmetic: str) -> float:
    """Share of the machine's best rate that is open to the kernels of ``variant``: all of it, but
    where there is AMX and they do not use it only what dot products of vectors do, by the declared
    rates."""
    tiles = "amx" in platform.features and variant != "amx" and arithmetic != "fp32"
    return _VECTOR_SHARE_OF_AMX if tiles else 1.0


def roofline(
    platform: Platform,
    *,
    read_bytes: float,
    operations: float,
    arithmetic: str,
    efficiency: float = 1.0,
    decode_seconds: float = 0.0,
    call_seconds: float = 0.0,
) -> float:
    """Seconds of one call: reading ``read_bytes`` from memory, or decoding and multiplying,
    whichever takes longer, as a core does both at once (Williams et al., "Roofline", 2009).

    ``operations``: 2·M·N·K for a matrix product, in ``arithmetic`` "fp32", "bf16" (and fp16),
    "int8", "fp8", "fp4" or "mma" (``MachineLimits.mma``), at ``efficiency`` times the machine's
    rate. ``decode_seconds``: time of turning codes into numbers, on all threads.
    ``call_seconds``: what a call costs without any work, besides one launch where the machine has
    launches.
    """
    limits = platform.limits
    multiply = operations / (limits.operations(arithmetic) * efficiency)
    return max(read_bytes / limits.read, decode_seconds + multiply) + call_seconds + limits.launch
