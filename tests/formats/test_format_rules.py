# SPDX-License-Identifier: Apache-2.0
"""Which modules a configuration quantizes, and how: the rules of the tools that wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.described import Described
from tests.support.messages import saying
from vllm.compressed_linear.formats.base import Hints
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.gptq import Gptq
from vllm.compressed_linear.formats.registry import format_of, parse, parse_in
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.scheme import CheckpointScheme

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128}
INT4 = {"num_bits": 4, "group_size": 128, "strategy": "group"}
INT8 = {"num_bits": 8, "strategy": "channel"}
Q = "model.layers.1.self_attn.q_proj"


def resolve(
    config: dict[str, Any], module: str = Q, kind: LayerKind = LayerKind.LINEAR
) -> Resolution:
    return Described.of(config).resolve(module, kind)


def bits_and_group(resolution: Resolution) -> tuple[int, int] | None:
    """What a scheme says; None for an unquantized module."""
    if isinstance(resolution, Unquantized):
        return None
    assert isinstance(resolution, CheckpointScheme)
    assert resolution.weight.scale is not None
    return resolution.weight.element.bits, resolution.weight.scale.group_size


# GPTQ.


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
        ({"group_size": 0}, ("group size", 0)),
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


# AWQ.


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        ([], (4, 128)),
        (None, (4, 128)),
        (["q_proj"], None),
        (["self_attn"], None),
        (["attn.q"], None),  # any part of the name, as AutoAWQ has it
        (["k_proj", "mlp"], (4, 128)),
    ],
)
def test_awq_modules_to_not_convert(
    excluded: list[str] | None, expected: tuple[int, int] | None
) -> None:
    assert bits_and_group(resolve({**AWQ, "modules_to_not_convert": excluded})) == expected


def test_awq_exclusions_are_relative_to_a_block_so_the_file_decides() -> None:
    config = Described.of({**AWQ, "modules_to_not_convert": ["layers.1.self_attn", "v_proj"]})
    value = Q.replace("q_proj", "v_proj")
    config = config.with_file([f"{Q}.qweight", f"{value}.weight"])
    assert bits_and_group(config.resolve(Q)) == (4, 128)
    assert bits_and_group(config.resolve(value)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "AWQ"},
        {"version": "GEMM"},
        {"version": None, "checkpoint_format": "gemm"},
        {"bits": None, "w_bit": 4, "group_size": None, "q_group_size": 128},
        {"zero_point": True, "sym": True},
    ],
)
def test_awq_configurations_of_other_tools_mean_the_same(change: dict[str, Any]) -> None:
    assert resolve({**AWQ, **change}) == resolve(AWQ)


def test_awq_without_zero_points_uses_them_where_the_file_has_them() -> None:
    config = Described.of({**AWQ, "zero_point": False})
    scheme = config.resolve(Q)
    assert isinstance(scheme, CheckpointScheme)
    assert scheme.weight.zero is None
    config = config.with_file([f"{Q}.qweight", f"{Q}.qzeros"])
    assert config.resolve(Q) == resolve(AWQ)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bits": 8}, ("AWQ", 8)),
        ({"version": "gemx"}, ("AWQ", "'gemx'")),
        ({"group_size": 0}, ("group size", 0)),
    ],
)
def test_awq_configurations_that_say_nothing_possible(
    change: dict[str, Any], complaint: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigError, match=saying(*complaint)):
        parse({**AWQ, **change})


# compressed-tensors.


def groups(*entries: tuple[list[str], dict[str, Any]], **other: Any) -> dict[str, Any]:
    """A configuration with one group for each (targets, weights)."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            f"group_{i}": {"targets": targets, "weights": weights}
            for i, (targets, weights) in enumerate(entries)
        },
        **other,
    }


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
        ({"num_bits": None}, ("num_bits", "None")),
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


# AutoRound.


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


def test_auto_round_head_and_schemes_of_vllm() -> None:
    head = LayerKind.HEAD
    assert bits_and_group(resolve(AUTO_ROUND, "lm_head", head)) is None
    extra = {**AUTO_ROUND, "extra_config": {"lm_head": {"bits": 8}}}
    assert bits_and_group(resolve(extra, "lm_head", head)) == (8, 128)
    assert format_of({**AUTO_ROUND, "data_type": "mx_fp"}) is None
    assert format_of({**AUTO_ROUND, "act_bits": 8}) is None
    with pytest.raises(ConfigError, match=saying("packing_format", "'x'")):
        parse({**AUTO_ROUND, "packing_format": "x"})


# All of them.


def test_unknown_methods_are_not_read() -> None:
    assert format_of({"quant_method": "x"}) is None
    assert format_of({"bits": 4}) is None
    with pytest.raises(ConfigError, match=saying("quant_method", "'x'")):
        parse({"quant_method": "x"})


@pytest.mark.parametrize(
    ("config", "hints"),
    [
        (GPTQ, Hints()),
        ({**GPTQ, "desc_act": True, "sym": True}, Hints(reordered=True, symmetric=True)),
        ({**AWQ, "sym": True}, Hints(symmetric=True)),
        ({**AUTO_ROUND, "sym": True}, Hints(symmetric=True)),
        (groups((["Linear"], INT4)), Hints(reordered=True)),
        ({}, Hints()),
    ],
)
def test_what_a_configuration_claims_of_the_data(config: dict[str, Any], hints: Hints) -> None:
    assert parse(config).hints() == hints


def as_a_part(name: str) -> str:
    """The renaming of a model whose language model is a part of it."""
    return f"language_model.{name}" if name.startswith("model.") else name


@pytest.mark.parametrize(
    "config",
    [
        {**GPTQ, "dynamic": {r"^model\.layers\.1\.": {"bits": 8}}},
        {**AUTO_ROUND, "extra_config": {Q: {"bits": 8}}, "block_name_to_quantize": "model.layers"},
        {**AUTO_ROUND, "extra_config": {r"^model\.layers\.1\.": {"bits": 8}}},
        groups(([r"re:^model\.layers.*"], INT8), ignore=[r"re:^model\.layers.*k_proj"]),
        groups(([Q], INT8), (["Linear"], INT4)),
    ],
)
def test_rules_hold_for_a_model_that_renames_its_weights(config: dict[str, Any]) -> None:
    found = Described.of(config)
    found = found.with_file([f"{Q}.{found.format.marker_tensors[0]}", f"{Q}.scales"])
    found = found.renamed(lambda name: name.replace("layers.", "model.layers.", 1))
    found = found.renamed(lambda name: name.replace("model.model.", "model.", 1))
    found = found.renamed(as_a_part)
    resolution = bits_and_group(found.resolve(f"language_model.{Q}"))
    assert resolution is not None
    assert resolution[0] == 8


# Entries that select no module.

K = Q.replace("q_proj", "k_proj")
NOWHERE = "model.layers.9.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "unmatched"),
    [
        (
            {**GPTQ, "dynamic": {"-:.*k_proj": {}, r"+:.*\.9\..*": {"bits": 8}}},
            [("dynamic", r"+:.*\.9\..*")],
        ),
        # The second rule never decides, but it does select a module.
        ({**GPTQ, "dynamic": {"-:.*": {}, "-:.*k_proj": {}}}, []),
        (
            {**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]},
            [("modules_in_block_to_quantize", "mlp.up_proj")],
        ),
        (
            {**AWQ, "modules_to_not_convert": ["k_proj", "mlp"], "dynamic": {"-:lm_head": {}}},
            [("modules_to_not_convert", "mlp"), ("dynamic", "-:lm_head")],
        ),
        (
            groups(([Q, NOWHERE], INT4), (["Linear"], INT8), ignore=["re:.*k_proj", "q_proj"]),
            [("ignore", "q_proj"), ("targets", NOWHERE)],
        ),
        # A class selects modules of that kind, and there is no embedding here.
        (groups((["Linear"], INT4), ignore=["Embedding"]), [("ignore", "Embedding")]),
        (
            {
                **AUTO_ROUND,
                "extra_config": {
                    Q: {"bits": 8},
                    "self_attn.k_proj": {"bits": 8},
                    r"attn\.[qk]": {"bits": 2},
                    NOWHERE: {"bits": 16},
                    "[": {"bits": 2},
                },
                "block_name_to_quantize": "model.layers,visual.blocks",
            },
            [
                ("extra_config", NOWHERE),
                ("extra_config", "["),
                ("block_name_to_quantize", "visual.blocks"),
            ],
        ),
        ({**AUTO_ROUND, "to_quant_block_names": "visual"}, [("to_quant_block_names", "visual")]),
        ({}, []),
    ],
)
@pytest.mark.parametrize("rename", [None, as_a_part])
@pytest.mark.parametrize("known", [False, True])
def test_entries_that_select_no_module_are_known(
    config: dict[str, Any],
    unmatched: list[tuple[str, str]],
    rename: Callable[[str], str] | None,
    known: bool,
) -> None:
    """As written, whatever the model calls its modules and whether or not the file is known."""
    found = Described.of(config)
    if known or rename is not None:
        # Names that the checkpoint alone has are known from its file only.
        codes = (*found.format.marker_tensors, "weight")[0]
        found = found.with_file([f"{Q}.{codes}", f"{K}.{codes}"])
    asked: dict[str, LayerKind | None] = {Q: LayerKind.LINEAR, K: LayerKind.LINEAR}
    if rename is not None:
        found = found.renamed(rename)
        asked = {rename(module): kind for module, kind in asked.items()}
    assert found.format.unmatched_entries(found.file, asked) == unmatched


def test_entries_of_modules_that_only_the_file_has_are_matched() -> None:
    """A model may leave a part of the checkpoint aside, such as a draft head."""
    found = Described.of({**AWQ, "modules_to_not_convert": ["mtp", "mlp"]})
    found = found.with_file([f"{Q}.qweight", "mtp.fc.weight"])
    asked: dict[str, LayerKind | None] = {Q: LayerKind.LINEAR}
    expected = [("modules_to_not_convert", "mlp")]
    assert found.format.unmatched_entries(found.file, asked) == expected


@pytest.mark.parametrize(
    "config",
    [
        {**AWQ, "modules_to_not_convert": ["model.layers.1.self_attn.k_proj"]},
        {**AUTO_ROUND, "extra_config": {K: {"bits": 16}}},
        groups((["Linear"], INT4), ignore=[K]),
        groups((["Linear"], INT4), ignore=[f"re:{K}"]),
    ],
)
def test_an_entry_with_two_spellings_is_one_entry(config: dict[str, Any]) -> None:
    """A reason quotes it as written, and one spelling that selects a module is enough."""
    found = Described.of(config).with_file([f"{Q}.x", f"{K}.x"]).renamed(as_a_part)
    resolution = found.resolve(f"language_model.{K}")
    assert isinstance(resolution, Unquantized)
    assert K in resolution.reason
    assert "language_model" not in resolution.reason
    asked: dict[str, LayerKind | None] = {f"language_model.{Q}": LayerKind.LINEAR}
    assert found.format.unmatched_entries(found.file, asked) == []
    gone = found.format.unmatched_entries(FileView(), asked)
    assert len(gone) == 1
    assert K in gone[0][1]


# A configuration in a file of its own.


@pytest.mark.parametrize(
    ("file", "written", "same_as"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}, GPTQ),
        ("quantize_config.json", {**GPTQ, "quant_method": "GPTQ"}, GPTQ),
        (
            "quant_config.json",
            {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
            AWQ,
        ),
    ],
)
def test_configuration_beside_config_json(
    file: str, written: dict[str, Any], same_as: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / file).write_text(json.dumps(written))
    names = [tensor.name for tensor in resolve(same_as).tensors]  # type: ignore[union-attr]
    found = Described(parse_in(tmp_path, {}), FileView()).with_file([f"{Q}.{n}" for n in names])
    assert found.resolve(Q) == resolve(same_as)
    found = found.renamed(as_a_part)
    mapped = f"language_model.{Q}"
    assert found.resolve(mapped) == resolve(same_as)
    found.file.check_against_file("layer", mapped, found.resolve(mapped))


def test_a_damaged_configuration_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(ConfigError, match=saying("quantize_config.json", "JSON")):
        parse_in(tmp_path, {})


def test_a_configuration_in_config_json_goes_first(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 32}))
    assert parse_in(tmp_path, GPTQ) == parse(GPTQ)


def test_without_any_configuration_nothing_is_quantized(tmp_path: Path) -> None:
    found = Described(parse_in(tmp_path, {}), FileView())
    assert isinstance(found.resolve(Q), Unquantized)
