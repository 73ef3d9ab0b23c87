# SPDX-License-Identifier: Apache-2.0
"""Which modules an AutoRound configuration quantizes, and how: the rules of the tools that
wrote it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.format_configs import AUTO_ROUND, GPTQ, Q, bits_and_group, resolve
from tests.support.messages import saying
from vllm.compressed_linear.formats.registry import format_of, parse
from vllm.compressed_linear.formats.resolution import ConfigError, LayerKind
from vllm.compressed_linear.spec.elements import E2M1, E4M3
from vllm.compressed_linear.spec.scheme import CheckpointScheme


@pytest.mark.parametrize(
    ("extra", "blocks", "expected"),
    [
        ({}, "model.layers", (4, 128)),
        ({}, "model.layers,visual.blocks", (4, 128)),
        ({}, [["model.layers.1"]], (4, 128)),
        ({}, "layers", None),  # names begin with a block's name
        ({}, None, (4, 128)),
        ({Q: {"bits": 8}}, "model.layers", (8, 128)),
        ({Q: {"bits": 16}}, "model.layers", None),
        ({Q: {"bits": 8, "group_size": 32}}, "visual", (8, 32)),
        ({"self_attn.q_proj": {"bits": 8}}, "model.layers", (8, 128)),
        ({r".*\.q_proj$": {"bits": 2}, Q: {"bits": 8}}, "model.layers", (8, 128)),
        ({r"attn\.q": {"bits": 8}, "attn.*": {"bits": 2}}, "model.layers", (8, 128)),
        ({"k_proj": {"bits": 8}, "[": {"bits": 2}}, "model.layers", (4, 128)),
    ],
)
def test_auto_round_overrides(
    extra: dict[str, Any], blocks: Any, expected: tuple[int, int] | None
) -> None:
    config = {**AUTO_ROUND, "extra_config": extra, "block_name_to_quantize": blocks}
    assert bits_and_group(resolve(config)) == expected


@pytest.mark.parametrize(
    ("packing", "bumped"),
    [
        (None, True),
        ("auto", True),
        ("auto_round:gptq", True),
        ("auto_round:auto_gptq", True),
        ("auto_round", False),
        ("auto_round:gptqmodel", False),
    ],
)
def test_auto_round_packing_says_who_stores_zero_points_less_one(
    packing: str | None, bumped: bool
) -> None:
    scheme = resolve({**AUTO_ROUND, "packing_format": packing})
    version = "gptq" if bumped else "gptq_v2"
    assert scheme == resolve({**GPTQ, "checkpoint_format": version})


@pytest.mark.parametrize(
    ("backend", "packing"),
    [
        ("auto", None),
        ("auto_round:gptq", "auto_round:auto_gptq"),
        ("auto_round:auto_awq", "auto_round:auto_awq"),
        ("gptq:exllamav2", "auto_round:auto_gptq"),
        ("awq:gemm", "auto_round:auto_awq"),
        ("auto_round", "auto_round"),
    ],
)
def test_early_configurations_say_backend(backend: str, packing: str | None) -> None:
    early = resolve({**AUTO_ROUND, "backend": backend})
    assert early == resolve({**AUTO_ROUND, "packing_format": packing})
    # The later word decides.
    both = {**AUTO_ROUND, "backend": "awq", "packing_format": "auto_round"}
    assert resolve(both) == resolve({**AUTO_ROUND, "packing_format": "auto_round"})


@pytest.mark.parametrize("field", ["rotation_config", "hadamard_config", "spinquant_config"])
def test_rotated_models_are_refused_by_name(field: str) -> None:
    for config in (AUTO_ROUND, {**AUTO_ROUND, "data_type": "mx_fp", "group_size": 32}):
        with pytest.raises(ConfigError, match=saying(field, "rotated")):
            parse({**config, field: {"block_size": 32}})
        assert parse({**config, field: None})


def test_settings_of_single_layers_of_floats() -> None:
    config = {
        "quant_method": "auto-round",
        "bits": 4,
        "data_type": "mx_fp",
        "group_size": 32,
        "extra_config": {Q: {"bits": 8}, "lm_head": {"bits": 16}},
    }
    found = resolve(config)
    assert isinstance(found, CheckpointScheme)
    assert found.weight.element == E4M3
    other = resolve(config, Q.replace("q_proj", "k_proj"))
    assert isinstance(other, CheckpointScheme)
    assert other.weight.element == E2M1


@pytest.mark.parametrize("size", [[0, 128], -2, "x"])
def test_group_sizes_of_floats_must_be_possible(size: object) -> None:
    config = {"quant_method": "auto-round", "bits": 8, "data_type": "fp", "group_size": size}
    with pytest.raises(ConfigError, match=saying("group_size", "expected")):
        resolve(config)


def test_auto_round_head_and_schemes_of_vllm() -> None:
    head = LayerKind.HEAD
    assert bits_and_group(resolve(AUTO_ROUND, "lm_head", head)) is None
    extra = {**AUTO_ROUND, "extra_config": {"lm_head": {"bits": 8}}}
    assert bits_and_group(resolve(extra, "lm_head", head)) == (8, 128)
    assert format_of({**AUTO_ROUND, "data_type": "bfp"}) is None
    assert format_of({**AUTO_ROUND, "data_type": "mx_fp", "bits": 6}) is None
    mx = {**AUTO_ROUND, "data_type": "mx_fp", "act_bits": 4, "act_data_type": "bfp"}
    assert format_of(mx) is None
    assert format_of({**AUTO_ROUND, "act_bits": 8}) is None
    with pytest.raises(ConfigError, match=saying("packing_format", "'x'")):
        parse({**AUTO_ROUND, "packing_format": "x"})


def test_experts_are_left_to_vllms_class_for_the_tensors_that_they_have() -> None:
    experts = "model.layers.1.mlp.experts"
    extra = {
        **{f"{experts}.{i}.up_proj": {"bits": 8, "group_size": 32} for i in range(4)},
        "model.layers.2.mlp.experts.0.up_proj": {"bits": 16},
        "lm_head": {"bits": 16},
        r".*shared.*": {"bits": 8},
    }
    config = {**AUTO_ROUND, "sym": True, "packing_format": "auto_round", "extra_config": extra}
    name, found = parse(config).delegated()
    assert name == "auto_gptq"
    dynamic = found.pop("dynamic")
    assert found == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "desc_act": False,
        "bits": 4,
        "group_size": 128,
        "sym": True,
    }

    def decided(layer: str) -> tuple[str, Any] | None:
        """As vLLM reads it: the first rule that matches from the name's beginning."""
        for rule, override in dynamic.items():
            if re.match(rule[2:], layer):
                return rule[:2], override
        return None

    for prefix in ("", "language_model."):
        assert decided(prefix + experts) == ("+:", {"bits": 8, "group_size": 32})
        assert decided(f"{prefix}model.layers.2.mlp.experts") == ("-:", {"bits": 16})
        assert decided(f"{prefix}model.layers.11.mlp.experts") is None
        assert decided(f"{prefix}model.layers.3.shared_expert") == ("+:", {"bits": 8})

    name, found = parse({**config, "packing_format": "auto_round:auto_awq"}).delegated()
    assert name == "auto_awq"
    assert (found["zero_point"], found["bits"], found["group_size"]) == (False, 4, 128)
    assert "lm_head" in found["modules_to_not_convert"]
