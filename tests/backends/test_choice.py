# SPDX-License-Identifier: Apache-2.0
"""Who is chosen, and what is said about the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.messages import saying, says
from tests.support.toy_backends import CPU, DESCRIPTOR, Toy, toy
from vllm.compressed_linear.backends import registry
from vllm.compressed_linear.backends.base import Capabilities, Verdict
from vllm.compressed_linear.backends.measurements import Measured, Measurements
from vllm.compressed_linear.backends.reference import ReferenceBackend
from vllm.compressed_linear.backends.registry import (
    NoBackendError,
    rank,
    register_backend,
    select,
    unregister_backend,
)
from vllm.compressed_linear.machine.cost import MIX
from vllm.compressed_linear.machine.limits import MachineLimits
from vllm.compressed_linear.machine.platform import Platform
from vllm.compressed_linear.spec.descriptor import (
    ActivationSpec,
    ChannelOrder,
    CompressedLinearDescriptor,
    ScaleSpec,
    TransformSpec,
    WeightSpec,
    ZeroSpec,
)
from vllm.compressed_linear.spec.elements import BF16, E4M3, ElementType, uint

pytestmark = pytest.mark.usefixtures("clean_registry")


@pytest.fixture
def only_toys(clean_registry: None) -> None:
    """Nothing registered but ``reference``."""
    for name in registry.backends():
        if name != registry.REFERENCE:
            unregister_backend(name)


@pytest.mark.usefixtures("only_toys")
def test_cheapest_first_then_by_name_reference_last_declined_behind() -> None:
    toys = [toy("b", 2.0), toy("a", 2.0), toy("c", 1.0), toy("dear", 1e30)]
    unable = toy("unable", 0.0, capabilities=Capabilities(devices=frozenset({"cuda"})))
    for order in itertools.islice(itertools.permutations([*toys, unable]), 0, 120, 17):
        for backend in order:
            register_backend(backend)
        ranked = rank(DESCRIPTOR, CPU)
        assert [c.name for c in ranked] == ["c", "a", "b", "dear", "reference", "unable"]
        assert ranked[0].seconds == pytest.approx(1.0)
        assert ranked[-1].seconds is None
        for backend in order:
            unregister_backend(backend.name)


@pytest.mark.usefixtures("only_toys")
def test_priority_goes_before_cost_but_not_before_ability() -> None:
    register_backend(toy("cheap", 1.0))
    register_backend(toy("dear", 9.0), priority=5)
    unable = toy("unable", capabilities=Capabilities(devices=frozenset({"cpu"})))
    register_backend(unable, priority=9)
    selection = select(DESCRIPTOR, CPU)
    assert selection.chosen.name == "dear"
    assert [c.name for c in selection.also_able] == ["cheap", "reference"]
    assert [c.name for c in selection.rejected] == ["unable"]
    assert selection.chosen_by == "cost model"


def measured(*, seconds: float = 1.0, variant: str = "") -> Measured:
    return Measured(variant, dict.fromkeys(MIX, seconds), dict.fromkeys(MIX, 0.01))


@pytest.mark.usefixtures("only_toys")
def test_measurements_go_before_estimates() -> None:
    for name, price in (("a", 1.0), ("b", 2.0), ("c", 0.5)):
        register_backend(toy(name, price))
    found = Measurements(
        layers={DESCRIPTOR: {"a": measured(seconds=4.0), "b": measured(seconds=3.0)}}
    )
    ranked = rank(DESCRIPTOR, CPU, found)
    assert [(c.name, c.measured) for c in ranked] == [
        ("b", True),
        ("a", True),
        ("c", False),
        ("reference", False),
    ]
    assert ranked[0].seconds == pytest.approx(3.0)
    assert select(DESCRIPTOR, CPU, measurements=found).chosen_by == "tuned"
    other = replace(DESCRIPTOR, in_features=256)
    assert select(other, CPU, measurements=found).chosen_by == "cost model"
    forced = select(DESCRIPTOR, CPU, measurements=found, override="c")
    assert (forced.chosen.name, forced.chosen_by) == ("c", "asked for")


@pytest.mark.usefixtures("only_toys")
def test_measurements_of_another_code_path_do_not_count() -> None:
    register_backend(toy("a", 2.0, variant=classmethod(lambda cls, d, p: "avx2")))
    register_backend(toy("b"))
    for variant, name in (("avx2", "a"), ("avx512", "b")):
        found = Measurements(layers={DESCRIPTOR: {"a": measured(variant=variant)}})
        assert select(DESCRIPTOR, CPU, measurements=found).chosen.name == name


@pytest.mark.usefixtures("only_toys")
def test_measurements_change_neither_ability_nor_priority_nor_reference() -> None:
    register_backend(toy("first", 9.0), priority=1)
    register_backend(toy("second"))
    register_backend(toy("unable", capabilities=Capabilities(devices=frozenset({"cuda"}))))
    names = ("second", "unable", "reference")
    found = Measurements(layers={DESCRIPTOR: {name: measured(seconds=0.0) for name in names}})
    ranked = [c.name for c in rank(DESCRIPTOR, CPU, found)]
    assert ranked == ["first", "second", "reference", "unable"]


@pytest.mark.usefixtures("only_toys")
def test_estimates_use_measured_limits() -> None:
    def seconds(cls: Any, d: Any, platform: Platform, m: int) -> float:
        return 1.0 / platform.limits.read

    register_backend(toy("a", seconds=classmethod(seconds)))
    limits = MachineLimits(read=4.0, fp32=1.0, bf16=1.0, int8=1.0)
    assert rank(DESCRIPTOR, CPU, Measurements(limits))[0].seconds == pytest.approx(0.25)


@pytest.mark.usefixtures("only_toys")
def test_an_override_wins_over_rank() -> None:
    register_backend(toy("cheap", 1.0))
    register_backend(toy("dear", 9.0, variant=classmethod(lambda cls, d, p: "slow path")))
    selection = select(DESCRIPTOR, CPU, override="dear")
    assert (selection.chosen.name, selection.variant) == ("dear", "slow path")
    assert selection.chosen_by == "asked for"
    assert select(DESCRIPTOR, CPU, override="reference", strict=True).chosen is ReferenceBackend


@pytest.mark.usefixtures("only_toys")
def test_an_override_that_cannot_is_an_error_with_every_reason() -> None:
    register_backend(
        toy("picky", capabilities=Capabilities(frozenset({"cuda"}), integer_bits=frozenset({8})))
    )
    with pytest.raises(NoBackendError) as caught:
        select(DESCRIPTOR, CPU, override="picky", layer="model.layers.3.qkv_proj")
    text = str(caught.value)
    assert says(text, "'picky'", "model.layers.3.qkv_proj", "64x128")
    assert says(text, "device cpu", "cuda")
    assert says(text, "4-bit", "integer", 8)
    with pytest.raises(NoBackendError, match=saying("'nobody'", "picky")):
        select(DESCRIPTOR, CPU, override="nobody")


@pytest.mark.usefixtures("only_toys")
def test_strict_refuses_reference() -> None:
    assert select(DESCRIPTOR, CPU).chosen is ReferenceBackend
    with pytest.raises(NoBackendError, match=saying("strict")):
        select(DESCRIPTOR, CPU, strict=True, layer="x")
    register_backend(Toy)
    assert select(DESCRIPTOR, CPU, strict=True).chosen is Toy


@pytest.mark.usefixtures("only_toys")
def test_nobody_can_lists_everyone_s_reasons() -> None:
    unregister_backend("reference")
    register_backend(toy("one", can_implement=classmethod(lambda cls, d, p: Verdict(("no AMX",)))))
    register_backend(
        toy("two", can_implement=classmethod(lambda cls, d, p: Verdict(("N is odd", "no GPU"))))
    )
    with pytest.raises(NoBackendError, match=saying("one", "no AMX", "two", "N is odd", "no GPU")):
        select(DESCRIPTOR, CPU)


def test_verdicts() -> None:
    assert Verdict()
    assert not Verdict(("no",))
    assert str(Verdict(("a", "b"))) == "a; b"


ALL = CompressedLinearDescriptor(
    128,
    64,
    WeightSpec(
        uint(5),
        ScaleSpec("float8_e4m3fn", "block", 32, 32),
        ZeroSpec("float", "float16"),
        row_scale="float32",
    ),
    "float64",
    "float64",
    channel_order=ChannelOrder(128),
    activation=ActivationSpec(E4M3, True, "token"),
    prescale="float32",
    transform=TransformSpec("hadamard", "input", 128),
    lookup=True,
)


def test_everything_undeclared_is_declined_each_with_both_sides() -> None:
    """A feature descriptors learn later is refused by backends written before it."""
    nothing = Capabilities(
        devices=frozenset({"cuda", "rocm"}),
        input_dtypes=frozenset({"bfloat16"}),
        scale_dtypes=frozenset({"float16"}),
        granularities=frozenset({"group"}),
    )
    expected = [
        "device cpu (supported: cuda, rocm)",
        "5-bit integer weights (supported bits: none)",
        "scale dtype float8_e4m3fn (supported: float16)",
        "scales per block (supported: group)",
        "float zero points (supported: none)",
        "input dtype float64 (supported: bfloat16)",
        "reordered input channels",
        "activations as e4m3 dynamic per token (supported: none)",
        "a per-channel scale of the activations",
        "Hadamard or rotation transforms",
        "second-level scales",
        "lookup of rows (an embedding table) is not supported",
        "lookup of rows of a weight whose x is transformed",
    ]
    reasons = list(nothing.reasons(ALL, CPU))
    for text in expected:
        assert [r for r in reasons if r.startswith(text)], (text, reasons)
    assert len(reasons) == len(expected)


@pytest.mark.parametrize(
    ("capabilities", "platform", "reason"),
    [
        ({"min_capability": 80}, "cuda:75", "capability 75 is too old (needs 80)"),
        ({"max_capability": 90}, "cuda:100", "capability 100 is too new (at most 90)"),
        ({"min_capability": 80, "max_capability": 90}, "cuda:89", ""),
        ({"cpu_features": frozenset({"avx2"})}, "cpu:generic", "CPU without avx2 (this is cpu:gen"),
        ({"cpu_features": frozenset({"avx2"})}, "cpu:amx", ""),
        ({"required_ops": ("_C::gemm",)}, "cpu:avx2", "_C::gemm is not available on cpu:avx2"),
    ],
)
def test_what_the_machine_lacks(capabilities: dict[str, Any], platform: str, reason: str) -> None:
    able = Capabilities(frozenset({"cpu", "cuda"}), frozenset({4}), **capabilities)
    reasons = list(able.reasons(DESCRIPTOR, Platform.parse(platform)))
    assert len(reasons) == bool(reason)
    assert all(reason in r for r in reasons)


def test_elements_that_are_no_integers() -> None:
    codebook = ElementType("mine", 1, codebook=(-1.0, 1.0))
    able = Capabilities(frozenset({"cpu"}), frozenset({4}), frozenset({"bf16"}))

    def reasons(element: ElementType, able: Capabilities) -> Iterable[str]:
        weight = WeightSpec(element)
        return list(
            able.reasons(CompressedLinearDescriptor(8, 8, weight, "bfloat16", "bfloat16"), CPU)
        )

    assert reasons(BF16, able) == []
    assert reasons(E4M3, able) == ["e4m3 weights (supported: bf16, uint4)"]
    assert reasons(codebook, able) == ["mine weights (supported: bf16, uint4)"]
    assert reasons(codebook, Capabilities(frozenset({"cpu"}), codebooks=True)) == []


def test_further_reasons_are_added_only_for_one_s_own_device() -> None:
    picky = toy("picky", further_reasons=classmethod(lambda cls, d, p: ["N is too round"]))
    assert picky.can_implement(DESCRIPTOR, CPU).reasons == ("N is too round",)
    (reason,) = picky.can_implement(DESCRIPTOR, Platform.parse("cuda:90")).reasons
    assert reason.startswith("device cuda")
