# SPDX-License-Identifier: Apache-2.0
"""Which modules a configuration of AMD Quark quantizes, and how."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.described import Described
from tests.support.format_configs import Q, as_a_part
from tests.support.messages import saying
from tests.support.quark_store import QuarkWeight, entry
from vllm.compressed_linear.formats.registry import format_of
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Unquantized,
)
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import E2M1, E3M2, E4M3
from vllm.compressed_linear.spec.scheme import CheckpointScheme

INT8 = QuarkWeight("int8").config


@pytest.mark.parametrize(
    ("exclude", "quantized"),
    [
        ([Q], False),
        (["*self_attn*"], False),
        (["*.q_proj"], False),
        (["re:model.layers.*self_attn.*"], False),
        (["q_proj"], True),
        (["self_attn"], True),
        (["model.layers.?.self_attn.q_proj"], False),
        (["model.layers.[2-9].*"], True),
        (["re:.*k_proj"], True),
        ([], True),
    ],
)
def test_exclusions_are_names_patterns_and_expressions(exclude: list[str], quantized: bool) -> None:
    config = {**INT8, "exclude": exclude}
    found = Described.of(config)
    for described, module in ((found, Q), (found.renamed(as_a_part), as_a_part(Q))):
        assert isinstance(described.resolve(module), CheckpointScheme) == quantized
    unmatched = found.format.unmatched_entries(found.file, {Q: LayerKind.LINEAR})
    assert bool(unmatched) == (bool(exclude) and quantized)


def test_named_layers_go_before_their_type_and_the_global_configuration() -> None:
    fp8 = QuarkWeight("fp8", channel=True).config["global_quant_config"]
    config = {**INT8, "layer_quant_config": {"*q_proj": fp8}}
    found = Described.of(config).resolve(Q)
    assert isinstance(found, CheckpointScheme)
    assert found.weight.element == E4M3
    typed = {**INT8, "layer_type_quant_config": {"nn.Linear": fp8}}
    found = Described.of(typed).resolve(Q)
    assert isinstance(found, CheckpointScheme)
    assert found.weight.element == E4M3
    left = {**config, "layer_quant_config": {"*q_proj": {"weight": None}}}
    assert isinstance(Described.of(left).resolve(Q), Unquantized)
    table = Described.of(INT8).resolve("model.embed_tokens", LayerKind.EMBEDDING)
    assert isinstance(table, Unquantized)


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        (QuarkWeight("fp8", x="token"), ActivationSpec(E4M3, True, "token", maximum=448.0)),
        (QuarkWeight("fp8", x="static"), ActivationSpec(E4M3, False, "tensor", maximum=448.0)),
        (
            QuarkWeight("mxfp4", x="own"),
            ActivationSpec(E2M1, True, "group", True, 32, "e8m0", 3.5),
        ),
        (
            QuarkWeight("mxfp6", x="own"),
            ActivationSpec(E3M2, True, "group", True, 32, "e8m0", 15.0),
        ),
        (
            QuarkWeight("nvfp4", x="own"),
            ActivationSpec(E2M1, True, "group", True, 16, "float8_e4m3fn", 6.0),
        ),
    ],
)
def test_inputs_are_what_vllm_computes(store: QuarkWeight, expected: ActivationSpec) -> None:
    found = Described.of(store.config).resolve(Q)
    assert isinstance(found, CheckpointScheme)
    assert found.activation == expected


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight": entry("bfp16", "per_group", group_size=8)}, "bfp16"),
        ({"weight": entry("fp4", "per_group", group_size=32)}, "fp4"),
        ({"input_tensors": entry("int4", "per_tensor")}, "int4"),
        ({"output_tensors": entry("int8", "per_tensor")}, "outputs"),
        ({"bias": entry("int8", "per_tensor")}, "biases"),
    ],
)
def test_other_kinds_are_left_to_vllm_with_the_reason(change: dict[str, Any], word: str) -> None:
    config = {**INT8, "global_quant_config": {**INT8["global_quant_config"], **change}}
    assert format_of(config) is None
    found = Described.of(config).resolve(Q)
    assert isinstance(found, Delegated)
    assert word in found.reason


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"quant_method": "quark"}, ("global_quant_config",)),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": 3}},
            ("global_quant_config.weight", 3),
        ),
        (
            {
                "quant_method": "quark",
                "global_quant_config": {"weight": entry("fp8_e4m3", "per_block")},
            },
            ("block_size",),
        ),
    ],
)
def test_configurations_that_say_nothing_possible(
    config: dict[str, Any], complaint: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigError, match=saying(*complaint)):
        Described.of(config)


def test_the_key_value_cache_is_vllms() -> None:
    config = {**INT8, "export": {"pack_method": "reorder", "kv_cache_group": ["*k_proj"]}}
    config["layer_quant_config"] = {"*k_proj": {"output_tensors": entry("fp8_e4m3", "per_tensor")}}
    found = Described.of(config)
    assert found.format.has_attention_scales(found.file)
    scheme = found.resolve(Q.replace("q_proj", "k_proj"))
    assert isinstance(scheme, CheckpointScheme)
    assert not Described.of(INT8).format.has_attention_scales(found.file)
