# SPDX-License-Identifier: Apache-2.0
"""Which modules a GPTQ configuration quantizes, and how: the rules of the tools that wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.described import Described
from tests.support.format_configs import GPTQ, Q, bits_and_group, resolve
from tests.support.messages import saying, says
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.gptq import PLAIN, Gptq
from vllm.compressed_linear.formats.registry import format_of, parse
from vllm.compressed_linear.formats.resolution import ConfigError, Delegated, LayerKind
from vllm.compressed_linear.spec.scheme import CheckpointScheme


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, (4, 128)),
        ({"+:.*q_proj": {"bits": 8, "group_size": 64}}, (8, 64)),
        ({r".*\.1\..*": {"group_size": 32}}, (4, 32)),
        ({"-:.*q_proj": {}}, None),
        # The first match decides, from the beginning of the full name.
        ({"+:.*q_proj": {"bits": 8}, "-:.*q_proj": {}}, (8, 128)),
        ({"-:.*q_proj": {}, "+:.*q_proj": {"bits": 8}}, None),
        ({"-:q_proj": {}, "-:self_attn": {}, r"-:layers\.1": {}}, (4, 128)),
        ({"-:model.layers.1": {}}, None),
        ({"+:.*k_proj": {"bits": 8}}, (4, 128)),
        ({"-:.*q_proj": None}, None),
    ],
)
def test_gptq_dynamic(rules: dict[str, Any], expected: tuple[int, int] | None) -> None:
    assert bits_and_group(resolve({**GPTQ, "dynamic": rules})) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "GPTQ"},
        {"bits": "4", "group_size": "128"},
        {"checkpoint_format": None},
        {"checkpoint_format": "GPTQ"},
        {"is_marlin_format": False},
        {"pack_dtype": "torch.int32"},
        {"dynamic": None},
        {"bits": None, "w_bit": 4, "group_size": 128},
    ],
)
def test_old_gptq_configurations_mean_the_same(change: dict[str, Any]) -> None:
    assert resolve({**GPTQ, **change}) == resolve(GPTQ)


SHAPES = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, (64, 96)),
    "auto-round": ({"quant_method": "auto-round", "bits": 4}, (64, 96)),
    "awq": ({"quant_method": "awq", "bits": 4}, (512, 12)),
}
"""A configuration without ``group_size``, and the shape of the codes of a weight [96, 512]."""


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("method", SHAPES)
def test_a_group_size_that_is_not_stated_is_that_of_the_scales(method: str, groups: int) -> None:
    config, codes = SHAPES[method]
    headers = Headers(
        {
            f"{Q}.{name}": TensorHeader(dtype, shape, 0, "model.safetensors")
            for name, dtype, shape in (
                ("qweight", "int32", codes),
                ("qzeros", "int32", (groups, 12)),
                ("scales", "float16", (groups, 96)),
            )
        }
    )
    found = parse(config)
    file = FileView(headers, found.marker_tensors)
    resolved = bits_and_group(found.resolve(Q, LayerKind.LINEAR, file))
    assert resolved in ((4, 512 // groups), (4, -1) if groups == 1 else None)
    assert bits_and_group(resolve(config)) == (4, 128)  # the default where no file is known


def test_gptq_group_size_null_is_one_group() -> None:
    assert bits_and_group(resolve({**GPTQ, "group_size": None})) == (4, -1)


@pytest.mark.parametrize(
    "change",
    [{"checkpoint_format": "marlin"}, {"is_marlin_format": True}, {"quant_method": "marlin"}],
)
def test_gptq_in_marlins_layout(change: dict[str, Any]) -> None:
    config = {**GPTQ, **change}
    scheme = resolve(config)
    assert isinstance(scheme, CheckpointScheme)
    assert [tensor.name for tensor in scheme.tensors] == ["B", "s"]
    assert format_of(config) is Gptq


@pytest.mark.parametrize("word", ["exllama", "exllamav2", "bitblas", "gptq_v3", "x"])
def test_words_that_name_no_layout_are_read_where_weights_are_symmetric(word: str) -> None:
    config = {**GPTQ, "checkpoint_format": word, "sym": True}
    expected = resolve({**GPTQ, "sym": True})
    assert format_of(config) is Gptq
    assert resolve(config) == expected
    found = Described.of(config)
    assert found.with_file([f"{Q}.{name}" for name in PLAIN]).resolve(Q) == expected
    # Other tensors than those of the usual layout, or zero points of a version that is not known.
    other = found.with_file([f"{Q}.qweight", f"{Q}.lut"]).resolve(Q)
    assert isinstance(other, Delegated)
    assert says(other.reason, repr(word))
    asymmetric = {**config, "dynamic": {".*q_proj": {"sym": False}}}
    assert isinstance(resolve(asymmetric), Delegated)
    for sym in (False, None):
        assert format_of({**config, "sym": sym}) is None
        with pytest.raises(ConfigError, match=saying(repr(word), "zero points")):
            parse({**config, "sym": sym})


def test_gptq_lm_head() -> None:
    head = LayerKind.HEAD
    assert bits_and_group(resolve(GPTQ, "lm_head", head)) is None
    assert bits_and_group(resolve({**GPTQ, "lm_head": True}, "lm_head", head)) == (4, 128)
    dynamic = {"+:lm_head": {"bits": 8}}
    assert bits_and_group(resolve({**GPTQ, "dynamic": dynamic}, "lm_head", head)) == (8, 128)
    assert bits_and_group(resolve(GPTQ, "model.embed_tokens", LayerKind.EMBEDDING)) is None


def test_gptq_module_list_counts_where_the_file_does_not_tell() -> None:
    config = Described.of(
        {**GPTQ, "modules_in_block_to_quantize": [["mlp.up_proj"], ["self_attn.o_proj"]]}
    )
    assert bits_and_group(config.resolve(Q)) is None
    assert config.resolve("model.layers.1.mlp.up_proj") == resolve(GPTQ)
    config = config.with_file([f"{Q}.qweight"])
    assert bits_and_group(config.resolve(Q)) == (4, 128)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bits": 9}, (9, "bits")),
        ({"bits": 1}, (1, "bits")),
        ({"bits": "four"}, ("bits", "'four'", "int")),
        ({"bits": None}, ("bits",)),
        ({"bits": 5}, (5, "gptq_p")),
        ({"group_size": 0}, ("group_size", 0)),
        ({"group_size": "all"}, ("group_size", "'all'")),
        ({"checkpoint_format": "gptq_v9"}, ("checkpoint_format", "'gptq_v9'")),
        ({"checkpoint_format": "marlin", "bits": 8}, ("Marlin", 8)),
        ({"pack_dtype": "int13"}, ("pack_dtype", "'int13'")),
        ({"dynamic": {"+:[": {}}}, ("dynamic", "'+:['")),
        ({"dynamic": ["a"]}, ("dynamic",)),
        ({"dynamic": {"+:a": 8}}, ("dynamic", "+:a")),
    ],
)
def test_gptq_configurations_that_say_nothing_possible(
    change: dict[str, Any], complaint: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigError, match=saying(*complaint)):
        parse({**GPTQ, **change})


def test_an_impossible_override_names_the_module_and_the_rule() -> None:
    config = {**GPTQ, "dynamic": {"+:.*q_proj": {"bits": 12}}}
    with pytest.raises(ConfigError, match=saying(Q, "dynamic", "+:.*q_proj", "GPTQ", 12)):
        resolve(config)


@pytest.mark.parametrize("dynamic", [{}, {".*": {"desc_act": True}}])
def test_reordered_channels_need_the_order(dynamic: dict[str, Any]) -> None:
    """Without ``g_idx`` every weight would be read with the scale of another group."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": not dynamic}
    described = Described.of(config | {"dynamic": dynamic})
    whole = ["a.qweight", "a.qzeros", "a.scales", "a.g_idx"]
    assert isinstance(described.with_file(whole).resolve("a"), CheckpointScheme)
    with pytest.raises(ConfigError, match=saying("a", "desc_act", "a.g_idx")):
        described.with_file(whole[:-1]).resolve("a")


def test_one_group_has_no_order() -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": True}
    described = Described.of(config).with_file(["a.qweight", "a.qzeros", "a.scales"])
    assert isinstance(described.resolve("a"), CheckpointScheme)


@pytest.mark.parametrize(
    "module", ["model.layers.0.self_attn.k_proj", "draft_model.model.layers.0.self_attn.k_proj"]
)
def test_an_order_is_looked_for_where_the_file_has_the_module(module: str) -> None:
    """vLLM's names of a drafter's modules, and of values that are stored as keys, are not those of
    the file."""
    stored = "model.layers.0.self_attn.k_proj"
    names = ("qweight", "qzeros", "scales", "g_idx")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    described = Described.of(config)
    file = described.with_file([f"{stored}.{name}" for name in names])
    for asked in (module, module.replace("k_proj", "v_proj")):
        assert isinstance(file.resolve(asked), CheckpointScheme)
    without = described.with_file([f"{stored}.{name}" for name in names[:-1]])
    for asked in (module, module.replace("k_proj", "v_proj")):
        with pytest.raises(ConfigError, match=saying("desc_act", "model.safetensors", "g_idx")):
            without.resolve(asked)
