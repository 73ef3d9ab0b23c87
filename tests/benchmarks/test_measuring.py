# SPDX-License-Identifier: Apache-2.0
"""What layers are measured with: rotating copies, contracts, loops for limits, processors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks import contest, families, limits, machine, never_slower, ours, rotation, stock
from benchmarks.contender import Contender
from benchmarks.native_code import in_threads
from benchmarks.schemes import SCHEMES, ZOO
from vllm.compressed_linear.machine.timing import Timing


def test_copies_exceed_the_cache_where_memory_allows() -> None:
    plenty = 1 << 40
    copies = rotation.wanted_copies(300, 1000, plenty)
    # The copy in use may lie in the cache; the others have to exceed it.
    assert (copies - 1) * 300 >= rotation.CACHE_MULTIPLE * 1000
    assert not rotation.may_be_cached(copies, 300, 0, 1000)


def test_memory_bounds_the_copies_and_the_result_says_so() -> None:
    memory = 8 * 600
    copies = rotation.wanted_copies(300, 1000, memory)
    assert copies * 300 <= memory // rotation.MEMORY_SHARE
    assert rotation.may_be_cached(copies, 300, 0, 1000)


def test_what_others_read_between_two_uses_counts() -> None:
    assert rotation.may_be_cached(4, 300, 0, 1000)
    assert not rotation.may_be_cached(4, 300, 4 * 900, 1000)


def test_time_bounds_the_copies() -> None:
    numbers = itertools.count()
    assert rotation.repeated(lambda: next(numbers), lambda first: 10**9, seconds=0) == (0, 1)
    assert rotation.repeated(lambda: 7, lambda first: first) == (7,) * 7


def contender(problem: object, weight: torch.Tensor, rounded: bool) -> Contender:
    """``x @ weight``, with x rounded to 8 bits by token or as it is."""

    def call(x: torch.Tensor, tensors: ours.Tensors) -> torch.Tensor:
        if rounded:
            step = x.float().abs().amax(1, keepdim=True) / 127
            x = ((x / step).round() * step).to(x.dtype)
        return x.double() @ tensors["weight"].t()

    return Contender("C", call, ({"weight": weight},))


@pytest.mark.parametrize(
    ("rounded", "expected"), [(False, contest.X_AS_IT_IS), (True, contest.X_ROUNDED)]
)
@pytest.mark.parametrize("name", ["w4", "w4-fp16", "bf16"])
def test_rounding_of_x_is_told_by_the_output(name: str, rounded: bool, expected: str) -> None:
    problem = ZOO[name].problem(64, 512)
    found = contest.contract_of(contender(problem, problem.weight, rounded), problem)
    assert found == expected


def test_quantization_that_the_checkpoint_asks_for_is_no_other_contract() -> None:
    problem = SCHEMES["w8a8"].problem(64, 256)
    found = contest.contract_of(contender(problem, problem.weight, True), problem)
    assert found == contest.X_QUANTIZED


def test_a_copied_layer_of_vllm_shares_no_tensor() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.register_parameter("absent", None)
    layer.extra = torch.zeros(2)
    built = stock.Built(layer, lambda layer, x, bias: x, "K", tensors_only=True)
    copied = built.on_copied_tensors().layer
    assert copied.absent is None
    for name in ("weight", "bias", "extra"):
        ours, theirs = getattr(copied, name), getattr(layer, name)
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"linear/planes/avx512/uint4": 3}, "planes/avx512"),
        (
            {"linear/quads/amx/uint8": 1, "linear/quads/avx512vnni/uint8": 2, "pack/planes": 1},
            "quads/amx, quads/avx512vnni",
        ),
        ({"linear/planes/avx2/bf16": 0}, ""),
    ],
)
def test_kernels_are_those_that_were_counted(counts: dict[str, int], expected: str) -> None:
    assert ours.kernels(counts) == expected


def test_a_kernel_of_ours_is_named_for_the_call_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.contender.cache_bytes", lambda: 1)
    problem = SCHEMES["w4"].problem(32, 128)
    kernel = ours.kernel_of(ours.contender(problem, "cpu"), problem.activations(1))
    layout, _, isa = kernel.partition("/")
    assert layout
    assert isa


def test_the_fixed_cost_is_that_of_sixteen_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.contender.cache_bytes", lambda: 1)
    scheme = SCHEMES["w4"]
    problem = scheme.problem(64, 256)
    whole = ours.contender(problem, "cpu")
    fixed = ours.Fixed(scheme, "cpu", whole, 256)
    assert fixed.small.output(problem.activations(2)).shape == (2, 16)
    assert len(fixed.small.copies) == len(whole.copies)
    assert all(t.wall > 0 for t in fixed.turn(problem.activations(1), 0))


def test_reading_leaves_nothing_out() -> None:
    size = 1 << 20
    memory_at = limits._memory(size)
    whole = size // 8 * 0x0101010101010101 % 2**64
    for streams in limits.STREAMS:
        for ahead in limits.AHEAD:
            total = limits._reader().reader_read(memory_at, size, streams, ahead)
            assert total % 2**64 == whole


def test_an_unknown_number_of_streams_reads_nothing() -> None:
    assert limits._reader().reader_read(limits._memory(1 << 20), 1 << 20, 3, 0) == -1


def test_reading_has_a_rate_for_each_number_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cache_bytes", lambda: 1)
    found = limits.read_rate(0.0)
    by_streams = found["read_gb_per_s_by_streams"]
    assert [*by_streams] == [str(streams) for streams in limits.STREAMS]
    assert found["read_gb_per_s"] == max(by_streams.values())


def test_products_of_this_machine_are_measured() -> None:
    found = limits.product_rates(0.0)
    assert all(product["gop_per_s"] > 0 for product in found)
    known = {"fp32", "bf16", "int8"}
    assert found
    assert {product["arithmetic"] for product in found} <= known


def test_threads_give_their_results() -> None:
    assert sorted(in_threads(lambda index: index * index, 3)) == [0, 1, 4]


XEON = """processor : 0
vendor_id : GenuineIntel
cpu family : 6
model : {model}
model name : Intel(R) Xeon(R) Processor
flags : fpu avx512f avx512_vnni {flags}

processor : 1
model : 1
"""
AMD = "vendor_id : AuthenticAMD\ncpu family : {family}\nmodel : {model}\nflags : {flags}\n"
ARM = "processor : 0\nCPU implementer : 0x41\nCPU part : 0xd4f\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (XEON.format(model=0xCF, flags="amx_bf16 amx_int8"), "emeraldrapids"),
        (XEON.format(model=0x8F, flags="amx_bf16 amx_int8"), "sapphirerapids"),
        (XEON.format(model=0x6A, flags=""), "icelake"),
        (XEON.format(model=0xCF, flags=""), "genuineintel-6-207"),
        (XEON.format(model=0xA7, flags="amx_bf16"), "genuineintel-6-167"),
        (AMD.format(family=25, model=17, flags="avx512_bf16"), "zen4"),
        (AMD.format(family=25, model=1, flags=""), "zen3"),
        (AMD.format(family=26, model=2, flags="avx512_bf16"), "zen5"),
        (ARM, "neoverse-v2"),
        ("", "unknown"),
    ],
)
def test_families_are_told_by_the_processors_numbers(text: str, name: str) -> None:
    assert families.family_of(families.facts(text)).name == name


def test_a_result_says_on_what_it_was_measured() -> None:
    about = machine.about()
    assert about["family"] == families.family().name
    assert about["cpu"]
    assert about["load_average_before"] >= 0


def test_results_lie_in_the_folder_of_their_family() -> None:
    results = Path(machine.ROOT) / "benchmarks" / "results"
    for file in results.glob("*/**/*.json"):
        if file.name == "counts.json":  # written by people
            continue
        family = json.loads(file.read_text()).get("machine", {}).get("family")
        assert family == file.relative_to(results).parts[0], file


@pytest.mark.parametrize(
    ("mine", "open_"),
    [((0.9, 0.8, 1.0), False), ((1.02, 0.9, 1.1), True), ((1.5, 1.4, 1.6), False)],
)
def test_a_ratio_is_undecided_where_the_intervals_meet_the_limit(
    mine: tuple[float, float, float], open_: bool
) -> None:
    theirs = Timing(1.0, 0.99, 1.01, 9)
    assert never_slower.undecided(Timing(*mine, calls=9), theirs) == open_
