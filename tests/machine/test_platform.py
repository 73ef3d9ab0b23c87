# SPDX-License-Identifier: Apache-2.0
"""Platforms by name, and the one this is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.support.messages import saying, says
from vllm.compressed_linear.backends.cpu.weight_only import CpuBackend
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.platform import NATIVE_LIBRARY, X86_TIERS, Platform
from vllm.compressed_linear.spec.elements import uint
from vllm.compressed_linear.testing.oracle import Case


@pytest.mark.parametrize(
    "name", [*(f"cpu:{tier}" for tier in X86_TIERS), "cpu:aarch64", "cuda:80", "cuda:120"]
)
def test_names_go_both_ways(name: str) -> None:
    platform = Platform.parse(name)
    assert platform.name == name
    assert platform.device == name.split(":")[0]
    assert NATIVE_LIBRARY in platform.ops
    assert hash(platform) == hash(Platform.parse(name))


def test_tiers_grow() -> None:
    tiers = [tier.features for tier in X86_TIERS.values()]
    assert all(small < large for small, large in itertools.pairwise(tiers))


def test_features_between_tiers_have_the_name_of_the_lower_one() -> None:
    assert Platform(features=frozenset({"avx2", "avx512", "amx"})).name == "cpu:avx512"


def test_the_name_is_the_instruction_set_that_runs_not_the_best_there_is() -> None:
    best = Platform.parse("cpu:amx")
    here = replace(best, isa="avx512bf16")
    assert here.name == "cpu:avx512bf16"
    assert CpuBackend.variant(Case(uint(4)).build().descriptor, here) == "avx512bf16"
    assert here.limits == best.limits, "they are the machine's, whatever runs"


@pytest.mark.skipif(native.available() is not None, reason="the native library is not built")
def test_this_machine_is_called_by_what_the_native_library_picks() -> None:
    here = Platform.detect()
    assert here.isa == native.isa()
    assert here.name == f"cpu:{native.isa() if here.machine == 'x86_64' else here.machine}"
    assert Platform.parse("cpu:generic").isa == ""


@pytest.mark.parametrize("text", ["tpu", "cpu:z80", "cuda:", "cuda:7", "cuda:x", "cuda:900"])
def test_unknown_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=saying("platform", text)):
        Platform.parse(text)


def test_the_gpu_of_a_machine_that_has_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=saying("torch", "cuda:90")):
        Platform.parse("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Platform, "detect", lambda device: f"detected {device}")
    assert Platform.parse("cuda") == "detected cuda"


def test_this_machine() -> None:
    here = Platform.detect()
    assert here == Platform.parse("") == Platform.parse("cpu")
    assert here.device == "cpu"
    assert here.name.startswith("cpu:")
    assert here.threads >= 1
    if NATIVE_LIBRARY not in here.ops:
        assert here.why_missing(NATIVE_LIBRARY)


def test_missing_operators_say_why() -> None:
    platform = Platform(missing=(("a::op", "a was not built"),))
    assert platform.why_missing("a::op") == "a was not built"
    assert says(str(platform.why_missing("b::op")), "b::op", "cpu:generic")


@pytest.mark.needs_vllm
def test_threads_are_those_of_vllm_s_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.compressed_linear.integration import compat

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-2|3")
    assert compat.serving_threads(2) == 3
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    assert compat.serving_threads(1) == torch.get_num_threads()
    # More ranks than places: vLLM does not start either.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    assert compat.serving_threads(3) == torch.get_num_threads()
