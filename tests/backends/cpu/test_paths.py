# SPDX-License-Identifier: Apache-2.0
"""Which instruction set is chosen for how many tokens, on processors that are not here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.support.cpu_library import ISAS, ISAS_INT8
from vllm.compressed_linear.backends.cpu import paths
from vllm.compressed_linear.backends.cpu.costs import CALL_CLASSES, COSTS, CallClass, can_multiply
from vllm.compressed_linear.backends.cpu.int8 import CpuInt8Backend, CpuInt8FastBackend
from vllm.compressed_linear.backends.cpu.weight_only import CpuBackend
from vllm.compressed_linear.machine import native
from vllm.compressed_linear.machine.isas import ISAS as ROWS
from vllm.compressed_linear.machine.isas import runnable
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.machine.profiles import PROFILES, Rate
from vllm.compressed_linear.settings import BATCH_INVARIANT, CPU_ISA
from vllm.compressed_linear.spec import elements
from vllm.compressed_linear.spec.descriptor import ActivationSpec, CompressedLinearDescriptor
from vllm.compressed_linear.spec.elements import BF16, E2M3, FP16, INT8, NF4, uint
from vllm.compressed_linear.testing.oracle import Case
from vllm.compressed_linear.testing.suite import MXFP4, NVFP4

NARROW = CallClass("floats", "narrow", "bfloat16")
BYTES8 = CallClass("integers", "bytes", "token")

built = pytest.mark.skipif(native.available() is not None, reason=str(native.available()))


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CPU_ISA, BATCH_INVARIANT):
        monkeypatch.delenv(name, raising=False)


def descriptor(case: Case) -> CompressedLinearDescriptor:
    return case.build().descriptor


def isas(call: CallClass, platform: Platform) -> list[str]:
    return [isa for _, isa in paths.paths_of(call, platform)]


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("call", CALL_CLASSES, ids=str)
def test_paths_ascend_and_run_on_the_processor(name: str, call: CallClass) -> None:
    platform = Platform.parse(f"cpu:{name}")
    found = paths.paths_of(call, platform)
    largest = [m for m, _ in found]
    assert largest[-1] is None
    assert [m for m in largest if m] == sorted({m for m in largest if m})
    assert {isa for _, isa in found} <= set(
        runnable(platform.machine, platform.features, call.kernels)
    )
    assert all(can_multiply(isa, call) for _, isa in found)
    assert all(a != b for (_, a), (_, b) in itertools.pairwise(found))


@pytest.mark.parametrize("name", ["sapphirerapids", "emeraldrapids", "graniterapids", "amx"])
def test_tiles_multiply_many_tokens_and_fp32_a_few_where_bf16_dots_are_slow(name: str) -> None:
    platform = Platform.parse(f"cpu:{name}")
    assert isas(NARROW, platform)[0] == "avx512"
    for call in (NARROW, BYTES8, CallClass("floats", "bf16", "bfloat16")):
        assert paths.path_at(paths.paths_of(call, platform), 512) == "amx"


@pytest.mark.parametrize("name", ["zen4", "zen5", "avx512bf16"])
def test_bf16_dots_are_taken_where_they_are_fast(name: str) -> None:
    assert isas(NARROW, Platform.parse(f"cpu:{name}")) == ["avx512bf16"]


def test_digits_of_x_are_taken_for_few_tokens_of_integers() -> None:
    zen4 = Platform.parse("cpu:zen4")
    for weights, most in (("int", 1), ("int8", 2)):
        found = paths.paths_of(CallClass("floats", weights, "bfloat16"), zen4)
        assert found == ((most, "avx512vnni"), (None, "avx512bf16"))
    call = CpuBackend.call_class
    assert call(descriptor(Case(uint(4), group=32))).weights == "int"
    assert call(descriptor(Case(uint(8), group=-1))).weights == "int8"
    assert call(descriptor(Case(uint(4), group=16))).weights == "int"
    assert call(descriptor(MXFP4)).weights == call(descriptor(NVFP4)).weights == "int"
    assert call(descriptor(Case(uint(4), k=192, group=48))).weights == "narrow", "no whole blocks"
    assert call(descriptor(Case(E2M3))).weights == "narrow", "no table of 4 bits"
    assert call(descriptor(Case(NF4))).weights == "wide", "no integers"


@pytest.mark.parametrize("name", ["zen3", "avx2"])
def test_avx2_multiplies_digits_of_narrow_codes(name: str) -> None:
    platform = Platform.parse(f"cpu:{name}")
    assert isas(CallClass("floats", "int", "bfloat16"), platform) == ["avx2madd", "avx2"]
    assert isas(CallClass("floats", "int8", "bfloat16"), platform) == ["avx2"]
    assert isas(NARROW, platform) == ["avx2"]


def test_flags_alone_decide_nothing() -> None:
    """One processor, with another rate of bf16 dot products."""
    zen4 = PROFILES["zen4"]
    slow = zen4.with_rates({"dotbf16_512": Rate(0.45, "measured")})
    assert slow.changed == ("dotbf16_512",)
    platform = replace(Platform.parse("cpu:zen4"), profile=slow)
    assert isas(NARROW, platform) == ["avx512"]
    assert CpuBackend.seconds(descriptor(Case(uint(4))), platform, 256) > CpuBackend.seconds(
        descriptor(Case(uint(4))), Platform.parse("cpu:zen4"), 256
    )


def test_what_a_virtual_machine_hides_is_not_used() -> None:
    amx = Platform.parse("cpu:sapphirerapids")
    hidden = replace(amx, features=amx.features - {"amx"})
    assert isas(NARROW, hidden) == ["avx512"]
    assert hidden.limits.bf16 < amx.limits.bf16 / 5


def test_batch_invariance_keeps_one_path_for_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    platform, d = Platform.parse("cpu:sapphirerapids"), descriptor(Case(uint(4)))
    assert not CpuBackend.rows_are_independent(d, platform)
    several = paths.paths_of(BYTES8, platform)
    assert len(several) > 1
    assert CpuInt8Backend.rows_are_independent(d, platform), "integers have the same bits"
    monkeypatch.setenv(BATCH_INVARIANT, "1")
    for call in CALL_CLASSES:
        if call.kernels == "floats":
            assert len(paths.paths_of(call, platform)) == 1
    assert CpuBackend.rows_are_independent(d, platform)
    assert paths.paths_of(BYTES8, platform) == several


def test_a_forced_instruction_set_is_the_only_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_ISA, "avx2")
    platform = Platform.parse("cpu:sapphirerapids")
    assert isas(NARROW, platform) == ["avx2"]
    assert CpuBackend.variant(descriptor(Case(uint(4))), platform) == "avx2"


def test_paths_in_words() -> None:
    assert paths.in_words(((8, "avx512"), (64, "amx"), (None, "avx2"))) == (
        "avx512 to M=8, amx to M=64, avx2"
    )


def test_nothing_that_is_kept_depends_on_the_rates() -> None:
    d = descriptor(Case(uint(4)))
    fast, slow = (Platform.parse(f"cpu:{name}") for name in ("zen4", "sapphirerapids"))
    assert CpuBackend.variant(d, fast) != CpuBackend.variant(d, slow)
    for backend in (CpuBackend, CpuInt8FastBackend):
        assert backend.prepared_variant(d, fast) == backend.prepared_variant(d, slow)


def test_every_instruction_set_has_costs() -> None:
    for kernels, costs in COSTS.items():
        assert set(costs) == {row.name for row in ROWS if row.has(kernels)}
    assert set(ISAS) <= set(COSTS["floats"])
    assert set(ISAS_INT8) <= set(COSTS["integers"])


TOKEN = ActivationSpec(INT8, True, "token")
GROUP = ActivationSpec(INT8, True, "group", group_size=32)
CASES = [
    *(
        (CpuBackend, Case(element, input_dtype=x))
        for element in (uint(4), uint(8), elements.E4M3, elements.E2M1, BF16, FP16)
        for x in ("bfloat16", "float16", "float32")
    ),
    (CpuBackend, Case(NF4)),
    (CpuBackend, Case(uint(4), activation=TOKEN, input_dtype="float16")),
    *((CpuInt8Backend, Case(uint(bits), activation=TOKEN)) for bits in (4, 8)),
    *((CpuInt8Backend, Case(uint(bits), activation=GROUP)) for bits in (4, 8)),
    *((CpuInt8FastBackend, Case(uint(bits))) for bits in (4, 8)),
]


@pytest.fixture
def table() -> Iterator[None]:
    paths.install_here()
    before = native.paths()
    yield
    native.select_paths(before)


@built
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("backend", "case"), CASES, ids=str)
def test_the_library_and_the_plan_mean_the_same_class_of_calls(
    backend: type[CpuBackend | CpuInt8Backend], case: Case
) -> None:
    problem = case.build()
    method = backend(problem.descriptor)
    tensors = method.prep_weights_for_execution(problem.weights)
    x = torch.randn(1, problem.descriptor.in_features).to(getattr(torch, case.input_dtype))
    for call in CALL_CLASSES:
        others = ISAS[0] if call.kernels == "floats" else ISAS_INT8[0]
        if others == "generic":
            pytest.skip("this processor has one instruction set")
        native.select_paths(f"{call} generic")
        native.reset_call_counts()
        method.apply(tensors, x)
        ran = {name.split("/")[2] for name in native.call_counts() if name.startswith("linear/")}
        assert (ran == {"generic"}) == (call == backend.call_class(problem.descriptor))


@built
def test_the_library_gets_the_paths_of_this_machine() -> None:
    here = Platform.detect()
    for call in CALL_CLASSES:
        expected = paths.paths_of(call, replace(here, cpu=""))
        assert paths.paths_of(call, here) == expected


def test_an_instruction_without_a_rate_is_never_the_fastest() -> None:
    """An instruction set that is forced here may be asked about for a processor without it."""
    zen3 = Platform.parse("cpu:zen3").rates
    for cost, call in ((COSTS["floats"]["avx512bf16"], NARROW), (COSTS["integers"]["amx"], BYTES8)):
        assert cost.cycles(call, zen3, 1, 4096.0) == float("inf")


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("call", CALL_CLASSES, ids=str)
def test_wide_dot_products_go_before_narrow_sums_of_products(name: str, call: CallClass) -> None:
    platform = Platform.parse(f"cpu:{name}")
    assert "avx512_vnni" not in platform.features or "avx2madd" not in isas(call, platform)
