# SPDX-License-Identifier: Apache-2.0
"""Cost model: the roofline estimate of one call, and the mix of calls of a server.

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
"""Share of a server's calls that have M tokens: the weights of the average over all M.

The mix is that of a chat on a CPU. 256 generated tokens for each prompt, and one prompt is one
call, of 512 tokens or fewer; 1 to 16 streams at once, half of the time only one, 3 on average: so 3
calls in 259 are prompts. They take about half of the time with 4-bit weights, so prefill counts for
about half."""


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

It serves many streams at once, since one stream leaves a GPU idle: vLLM runs up to 256 and fills
every call with prompts up to 2048 tokens. Assumed are about 50 streams at once, between one and
256; each generates 256 tokens for a prompt of 512, so a call of 2048 tokens serves four prompts,
and there is one such call for about 20 that generate. An assumption about use, not a
measurement."""


def mix(device: str) -> Mapping[int, float]:
    """The mix of calls of a server whose layers run on ``device``."""
    return MIX if device == "cpu" else GPU_MIX


def mix_of(sizes: Collection[int]) -> Mapping[int, float]:
    """The mix whose M are all in ``sizes``; ``KeyError`` names a missing one."""
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
    """Seconds of one call: the longer of reading ``read_bytes`` from memory and of decoding and
    multiplying, since a core overlaps the two (Williams et al., "Roofline", 2009).

    ``operations``: 2·M·N·K for a matrix product, in ``arithmetic`` "fp32", "bf16" (and fp16),
    "int8", "fp8", "fp4" or "mma" (``MachineLimits.mma``), at ``efficiency`` times the machine's
    rate. ``decode_seconds``: time of turning codes into numbers, on all threads.
    ``call_seconds``: fixed cost of a call, without the launch of a GPU kernel.
    """
    limits = platform.limits
    multiply = operations / (limits.operations(arithmetic) * efficiency)
    return max(read_bytes / limits.read, decode_seconds + multiply) + call_seconds + limits.launch


def overlapped(
    platform: Platform, *, read_bytes: float, cycles: float, call_seconds: float = 0.0
) -> float:
    """The same of a kernel on a CPU whose work is counted in ``cycles`` of one core, which all
    threads share: ``platform.rates`` has the clock."""
    compute = cycles / (platform.rates.clock * platform.threads)
    return max(read_bytes / platform.limits.read, compute) + call_seconds
