# SPDX-License-Identifier: Apache-2.0
"""Which modules a configuration of compressed-tensors quantizes, and how: the rules of that
library."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.format_configs import INT4, INT8, Q, bits_and_group, groups, resolve
from tests.support.messages import saying
from vllm.compressed_linear.formats.registry import format_of, parse
from vllm.compressed_linear.formats.resolution import ConfigError, Delegated, LayerKind


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        ((["Linear"], [Q]), []),
        (([Q], ["Linear"]), []),
        ((["re:.*q_proj"], ["Linear"]), []),
        ((["Linear"], ["re:.*q_proj"]), []),
        (([Q], ["re:.*q_proj"]), []),
        ((["re:.*q_proj"], [Q]), []),
        # Of two expressions the first in the order of the text, whichever group has it.
        ((["re:.*q_proj"], [r"re:.*self_attn\..*"]), []),
        (([r"re:.*self_attn\..*"], ["re:.*q_proj"]), []),
        ((["re:.*_proj"], ["re:.*q_proj"]), []),
        ((["Linear"], ["Linear"]), []),  # the last group with a target
        ((["re:.*q_proj"], ["re:.*k_proj"]), ["re:.*q_proj"]),
        ((["Linear"], ["re:.*k_proj"]), [Q]),
        ((["Linear"], ["re:.*k_proj"]), ["Linear"]),
        ((["Linear"], ["re:.*k_proj"]), ["q_proj"]),  # no whole name: excludes nothing
        ((["q_proj"], ["re:q_proj"]), []),  # neither matches
        ((["re:model.*q_"], []), ["re:.*mlp"]),
    ],
)
def test_targets_match_as_the_library_has_it(
    targets: tuple[list[str], list[str]], ignore: list[str]
) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = groups((targets[0], INT4), (targets[1], INT8), ignore=ignore)
    model = torch.nn.Module()
    at = model
    for part in Q.split(".")[:-1]:
        at.add_module(part, torch.nn.Module())
        at = at.get_submodule(part)
    at.add_module("q_proj", torch.nn.Linear(256, 32))
    library = QuantizationConfig.model_validate({**config, "quantization_status": "initialized"})
    apply_quantization_config(model, library)
    scheme = getattr(model.get_submodule(Q), "quantization_scheme", None)
    expected = None if scheme is None else scheme.weights.num_bits

    found = bits_and_group(resolve(config))
    assert (None if found is None else found[0]) == expected


def test_lm_head_is_a_linear_layer_and_embeddings_are_another_class() -> None:
    config = groups((["Linear"], INT4))
    assert bits_and_group(resolve(config, "lm_head", LayerKind.HEAD)) == (4, 128)
    assert bits_and_group(resolve(config, "model.embed_tokens", LayerKind.EMBEDDING)) is None
    ignored = groups((["Linear"], INT4), ignore=["lm_head"])
    assert bits_and_group(resolve(ignored, "lm_head", LayerKind.HEAD)) is None


@pytest.mark.parametrize(
    ("weights", "other", "reason"),
    [
        ({"type": "float"}, {}, "float weights"),
        ({"strategy": "tensor"}, {}, "strategy tensor"),
        ({}, {"format": "int-quantized"}, "format int-quantized"),
        ({}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity"),
        ({}, {"transform_config": {"config_groups": {"a": {}}}}, "transforms"),
    ],
)
def test_other_schemes_are_left_to_vllm(
    weights: dict[str, Any], other: dict[str, Any], reason: str
) -> None:
    config = groups((["Linear"], {**INT4, **weights}), **other)
    assert format_of(config) is None
    resolution = resolve(config)
    assert isinstance(resolution, Delegated)
    assert reason in resolution.reason


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_bits": None}, ("weights", "num_bits")),
        ({"num_bits": 12}, (12, "bits")),
        ({"group_size": "x"}, ("group_size", "'x'")),
        ({"group_size": 0}, ("group_size", 0)),
    ],
)
def test_compressed_tensors_that_say_nothing_possible(
    change: dict[str, Any], complaint: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigError, match=saying(*complaint)):
        parse(groups((["Linear"], {**INT4, **change})))
