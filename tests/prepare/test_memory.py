# SPDX-License-Identifier: Apache-2.0
"""Preparing a layer takes its result and at most 64 MiB more, by the kernel's own accounting."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from pathlib import Path

import pytest
import torch

from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.formats.awq import awq_gemm_scheme
from vllm.compressed_linear.formats.compressed_tensors_schemes import pack_quantized_scheme
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.prepare.layer import prepare
from vllm.compressed_linear.prepare.plan import Plan
from vllm.compressed_linear.settings import Settings
from vllm.compressed_linear.spec.elements import torch_dtype
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role

N, K = 28672, 8192
"""gate_up_proj of a 70B model on four ranks: 112 MiB of 4-bit codes, 224 MiB unpacked."""
ALLOWANCE = 64 << 20

SCHEMES = {
    "gptq": gptq_scheme(4, 128, version="gptq"),
    "gptq-act-order": gptq_scheme(4, 128, version="gptq_v2"),
    "awq": awq_gemm_scheme(128),
    "compressed-tensors": pack_quantized_scheme(4, 128, symmetric=True, group_index=False),
}


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process; mapped files are not in it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class Peak:
    """Largest ``anonymous_bytes`` seen while the context is open, sampled every millisecond."""

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = self.most = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        return self.most - self.before


def random_shard(
    scheme: CheckpointScheme, *, act_order: bool, n: int = N, k: int = K
) -> LoadedShard:
    source = ShardSource("layer", scheme, n, k, 0, n, 0, k)
    tensors = {}
    for stored in scheme.tensors:
        shape = stored.shape(source.extents)
        if stored.role is Role.SCALE:
            tensors[stored.name] = torch.rand(shape).add_(0.5).to(torch.float16)
        elif stored.role in (Role.CODES, Role.ZERO):
            dtype = torch_dtype(stored.dtype)
            tensors[stored.name] = torch.randint(0, 1 << 31, shape, dtype=dtype)
    if act_order:
        tensors["g_idx"] = (torch.arange(k, dtype=torch.int32) // 128)[torch.randperm(k)]
    return LoadedShard(source, tensors)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounting")
@pytest.mark.parametrize("name", SCHEMES)
def test_preparation_takes_its_result_and_64_mib(name: str) -> None:
    act_order = name == "gptq-act-order"
    context = LayerContext("bfloat16", "bfloat16")
    platform = Platform.detect()
    # What the first layer of a process imports and allocates for good is not preparation's.
    small = random_shard(SCHEMES[name], act_order=act_order, n=256, k=256)
    prepare("small", "linear", [small], context, platform, Settings(), Plan())
    shard = random_shard(SCHEMES[name], act_order=act_order)
    with Peak() as peak:
        ((executor, tensors),) = prepare(
            "layer", "linear", [shard], context, platform, Settings(), Plan()
        )
    result = sum(t.nbytes for t in tensors.values())
    assert executor.method.name == "cpu"
    assert result > 100 << 20
    print(f"{name}: result {result >> 20} MiB, peak extra {(peak.extra - result) >> 20} MiB")
    assert peak.extra <= result + ALLOWANCE
