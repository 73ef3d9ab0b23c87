# SPDX-License-Identifier: Apache-2.0
"""Findings about a checkpoint that does not fit its model: names, words, severity."""

from __future__ import annotations

import pytest

from tests.support.messages import says
from vllm.compressed_linear import settings
from vllm.compressed_linear.checkpoint import completeness
from vllm.compressed_linear.checkpoint.completeness import Severity, Unfilled, expected_names

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION = "model.layers.3.self_attn"
EXPERTS = "model.layers.3.mlp.experts"


@pytest.mark.parametrize(
    ("parameter", "filled_by", "experts", "expected"),
    [
        ("model.norm.weight", [], 0, ["model.norm.weight"]),
        (f"{ATTENTION}.qkv_proj.bias", [], 0, [f"{ATTENTION}.{x}_proj.bias" for x in "qkv"]),
        (
            f"{ATTENTION}.qkv_proj.bias",
            [f"{ATTENTION}.q_proj.bias", f"{ATTENTION}.v_proj.bias"],
            0,
            [f"{ATTENTION}.k_proj.bias"],
        ),
        # Names on disk are those of the members that are there, not vLLM's.
        (
            "blocks.0.qkv_proj.weight",
            ["transformer.h.0.q_proj.weight"],
            0,
            ["transformer.h.0.k_proj.weight", "transformer.h.0.v_proj.weight"],
        ),
        # One expert is there in part, one not at all.
        (
            f"{EXPERTS}.routed_experts.w13_weight",
            [f"{EXPERTS}.{i}.{w}.weight" for i, w in [(0, "w1"), (0, "w3"), (2, "w1")]],
            3,
            [f"{EXPERTS}.1.w1.weight", f"{EXPERTS}.1.w3.weight", f"{EXPERTS}.2.w3.weight"],
        ),
        # As in another layer.
        ("layers.7.norm1.weight", [], 0, ["model.decoder.7.input_layernorm.weight"]),
        ("layers.7.experts.1.w", [], 0, ["model.decoder.7.e.1.weight"]),
        # In that one the numbers on disk are others.
        ("layers.7.renumbered", [], 0, []),
    ],
)
def test_names_of_what_is_missing(
    parameter: str, filled_by: list[str], experts: int, expected: list[str]
) -> None:
    others = {
        "layers.2.norm1.weight": ["model.decoder.2.input_layernorm.weight"],
        "layers.2.experts.1.w": ["model.decoder.2.e.1.weight"],
        "layers.2.renumbered": ["x.3"],
        "layers.2.unfilled": [],
    }
    found = expected_names(parameter, filled_by, others, PACKED, experts)
    assert sorted(found) == sorted(expected)


def test_missing_parameters_are_one_error_that_names_the_setting() -> None:
    unfilled = [Unfilled(f"model.layers.{i}.q_norm.weight", "float32", (64,)) for i in range(61)]
    unfilled.append(
        Unfilled(
            f"{ATTENTION}.qkv_proj.bias",
            "bfloat16",
            (192,),
            (f"{ATTENTION}.k_proj.bias",),
            (f"{ATTENTION}.q_proj.bias",),
            "rows 64 to 127",
            (f"{ATTENTION}.k_proj.biases",),
        )
    )
    (finding,) = completeness.missing(unfilled, "SomeModel", "a/checkpoint")
    assert finding.severity is Severity.ERROR
    assert finding.names == tuple(u.name for u in unfilled)
    assert says(
        finding.message,
        "a/checkpoint",
        "62 parameters",
        "SomeModel",
        "model.layers.0.q_norm.weight (float32 [64]) and 60 like it",
        f"{ATTENTION}.qkv_proj.bias (bfloat16 [192], rows 64 to 127",
        f"expected {ATTENTION}.k_proj.bias",
        f"{ATTENTION}.q_proj.bias",
        f"{ATTENTION}.k_proj.biases",
        f"{settings.ALLOW_MISSING}=1",
    )
    (allowed,) = completeness.missing(unfilled, "SomeModel", "a/checkpoint", allowed=True)
    assert allowed.severity is Severity.WARNING
    assert says(allowed.message, "62 parameters", settings.ALLOW_MISSING)


def test_many_names_are_shortened_in_the_message_but_not_in_the_finding() -> None:
    names = [f"{chr(97 + kind)}.{i}" for kind in range(9) for i in range(100)]
    (finding,) = completeness.unused(names, "SomeModel")
    assert finding.severity is Severity.WARNING
    assert finding.names == tuple(names)
    assert says(finding.message, "900 tensors", "a.0 and 99 like it, b.0", "300 more")
    assert len(finding.message) < 400


def test_entries_that_match_nothing_are_one_warning() -> None:
    (finding,) = completeness.unmatched([("ignore", "lm_heat"), ("targets", "re:.*qq$")])
    assert finding.severity is Severity.WARNING
    assert says(finding.message, "2 entries", "ignore: 'lm_heat'", "targets: 're:.*qq$'")


def test_nothing_is_found_where_nothing_is_left_over() -> None:
    assert completeness.missing([], "M", "c") == []
    assert completeness.unused([], "M") == []
    assert completeness.unmatched([]) == []
    assert completeness.never_arrived([]) == []
