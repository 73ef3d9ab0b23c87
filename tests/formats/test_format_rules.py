# SPDX-License-Identifier: Apache-2.0
"""Rules that hold for the configurations of all formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.described import Described
from tests.support.format_configs import (
    AUTO_ROUND,
    AWQ,
    GPTQ,
    INT4,
    INT8,
    Q,
    as_a_part,
    bits_and_group,
    groups,
    resolve,
)
from tests.support.messages import saying
from vllm.compressed_linear.formats.base import Hints
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.registry import format_of, parse, parse_in
from vllm.compressed_linear.formats.resolution import ConfigError, LayerKind, Unquantized

# All of them.


def test_unknown_methods_are_not_read() -> None:
    assert format_of({"quant_method": "x"}) is None
    assert format_of({"bits": 4}) is None
    with pytest.raises(ConfigError, match=saying("quant_method", "'x'")):
        parse({"quant_method": "x"})


@pytest.mark.parametrize(
    ("config", "hints"),
    [
        (GPTQ, Hints(symmetric=True)),
        ({**GPTQ, "sym": False}, Hints()),
        ({**GPTQ, "desc_act": True, "sym": True}, Hints(reordered=True, symmetric=True)),
        ({**AWQ, "sym": True}, Hints(symmetric=True)),
        ({**AUTO_ROUND, "sym": True}, Hints(symmetric=True)),
        (groups((["Linear"], INT4)), Hints(reordered=True)),
        ({}, Hints()),
    ],
)
def test_what_a_configuration_claims_of_the_data(config: dict[str, Any], hints: Hints) -> None:
    assert parse(config).hints() == hints


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
