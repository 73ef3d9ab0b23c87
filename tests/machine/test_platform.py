# SPDX-License-Identifier: Apache-2.0
"""Platforms by name, and the one this is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from tests.support.messages import saying, says
from vllm.compressed_linear.machine import this_cpu
from vllm.compressed_linear.machine.isas import ISAS
from vllm.compressed_linear.machine.platform import NATIVE_LIBRARY, Platform
from vllm.compressed_linear.machine.profiles import INSTRUCTIONS, PROFILES, Profile, plain_profile
from vllm.compressed_linear.settings import CPU_ISA, CPU_PROFILE


@pytest.mark.parametrize("name", [*(f"cpu:{name}" for name in PROFILES), "cuda:80", "cuda:120"])
def test_names_go_both_ways(name: str) -> None:
    platform = Platform.parse(name)
    assert platform.name == name
    assert platform.device == name.split(":")[0]
    assert NATIVE_LIBRARY in platform.ops
    assert hash(platform) == hash(Platform.parse(name))


PLAIN = ["generic", "avx2", "avx512", "avx512bf16", "amx"]


def test_plain_profiles_grow() -> None:
    features = [PROFILES[name].features for name in PLAIN]
    assert all(small < large for small, large in itertools.pairwise(features))


def test_features_between_plain_profiles_have_the_name_of_the_lower_one() -> None:
    assert Platform(features=frozenset({"avx2", "avx512", "amx"})).name == "cpu:avx512"


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: str(profile.name))
def test_a_profile_has_a_rate_of_every_instruction_of_its_features_and_of_no_other(
    profile: Profile,
) -> None:
    expected = {n for n, i in INSTRUCTIONS.items() if i.features <= profile.features}
    assert {name for name, _ in profile.rates} == expected
    assert all(rate.value > 0 for _, rate in profile.rates)


def test_no_two_profiles_claim_a_processor() -> None:
    claimed = [name for profile in PROFILES.values() for name in profile.known_as]
    assert len(claimed) == len(set(claimed))


@pytest.mark.parametrize(
    ("cpu", "features", "name"),
    [
        ("AMD EPYC, cpu family 25, model 17", PROFILES["zen4"].features, "zen4"),
        ("AMD EPYC, cpu family 25, model 1", PROFILES["zen3"].features, "zen3"),
        ("Intel(R) Xeon(R), cpu family 6, model 207", PROFILES["amx"].features, "emeraldrapids"),
        # A virtual machine that hides the tiles.
        ("Intel(R) Xeon(R), cpu family 6, model 143", PROFILES["zen4"].features, "sapphirerapids"),
        ("some processor", PROFILES["avx2"].features, "avx2"),
        ("some processor", PROFILES["avx512bf16"].features, "avx512bf16"),
        ("some processor", PROFILES["sapphirerapids"].features, "sapphirerapids"),
        ("some processor", frozenset({"avx2", "fma9"}), "avx2"),
        ("some processor", frozenset(), "generic"),
    ],
)
def test_the_published_profile_of_a_processor(
    cpu: str, features: frozenset[str], name: str
) -> None:
    assert this_cpu.published(cpu, "x86_64", features).name == name


def test_arm_processors_have_profiles_of_their_own() -> None:
    features = PROFILES["neoverse-v2"].features
    assert this_cpu.published("0xd4f", "aarch64", features).name == "neoverse-v2"
    assert plain_profile("aarch64", frozenset({"neon"})).name == "aarch64"


def test_the_profile_of_this_machine_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zen4", "icelake"):
        monkeypatch.setenv(CPU_PROFILE, name)
        here = Platform.detect()
        assert here.rates.rates == PROFILES[name].rates
        assert CPU_PROFILE in here.rates.origin
    monkeypatch.setenv(CPU_PROFILE, "z80")
    with pytest.raises(ValueError, match=saying(CPU_PROFILE, "'z80'", "zen4")):
        Platform.detect()


def test_a_forced_instruction_set_names_the_platform_and_not_its_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = replace(Platform.parse("cpu:amx"), isa="avx512")
    assert here.name == "cpu:avx512"
    assert here.limits == Platform.parse("cpu:amx").limits, "they are the machine's, whatever runs"
    monkeypatch.delenv(CPU_ISA, raising=False)
    assert Platform.detect().isa == ""


def test_instruction_sets_are_known_by_one_name() -> None:
    assert len({isa.name for isa in ISAS}) == len(ISAS)


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
