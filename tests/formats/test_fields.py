# SPDX-License-Identifier: Apache-2.0
"""Fields of configurations as tools and people write them, and what no format can take for them."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from tests.support.format_configs import AUTO_ROUND, AWQ, GPTQ, INT4, Q, groups, resolve
from tests.support.messages import saying
from vllm.compressed_linear.formats.fields import Fields
from vllm.compressed_linear.formats.registry import format_of
from vllm.compressed_linear.formats.resolution import ConfigError


@pytest.mark.parametrize(
    ("value", "expected"),
    [(4, 4), (4.0, 4), ("4", 4), (" 4 ", 4), ("4.0", 4), (-1, -1), ("-1", -1), (1e3, 1000)],
)
def test_whole_numbers(value: Any, expected: int) -> None:
    assert Fields({"a": value}).integer("a") == expected
    assert Fields({"b": value}).integer("a", "b") == expected


@pytest.mark.parametrize(
    "value", [True, "four", 4.5, "4.5", float("nan"), float("inf"), "", [4], {"a": 4}, "1e999"]
)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(ConfigError, match=saying("quantization_config.a", "int")):
        Fields({"a": value}).integer("a")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((v, True) for v in (True, "true", "True", 1, "1", 1.0)),
        *((v, False) for v in (False, "false", "FALSE", 0, "0")),
        (None, None),
    ],
)
def test_flags(value: Any, expected: bool | None) -> None:
    assert Fields({"a": value}).flag("a") is expected


@pytest.mark.parametrize("value", ["yes", 2, [], [True], {}, ""])
def test_what_is_no_flag(value: Any) -> None:
    with pytest.raises(ConfigError, match=saying("a.b", "true or false")):
        Fields({"b": value}, "a").flag("b")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("Linear", ["Linear"]),
        (["a", "b"], ["a", "b"]),
        ([["a"], ["b", ["c"]], None], ["a", "b", "c"]),
        ([], []),
    ],
)
def test_names(value: Any, expected: list[str]) -> None:
    assert Fields({"a": value}).names("a") == expected


@pytest.mark.parametrize("value", [4, {"a": 1}, [4], [["a"], {"b": 1}], True])
def test_what_is_no_list_of_names(value: Any) -> None:
    with pytest.raises(ConfigError, match=saying("quantization_config.a", "a list of names")):
        Fields({"a": value}).names("a")


def test_a_list_in_a_list_without_end() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ConfigError, match=saying("quantization_config.a", "a list of names")):
        Fields({"a": endless}).names("a")


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ConfigError) as caught:
        Fields({"a": "x" * 10_000}).integer("a")
    assert len(str(caught.value)) < 200


# The same for all formats.

Q4 = {**GPTQ, "sym": True}
WRITTEN_OTHERWISE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (GPTQ, {**GPTQ, "bits": "4", "group_size": 128.0, "desc_act": "false", "lm_head": "false"}),
    (Q4, {**GPTQ, "sym": "true"}),
    (GPTQ, {**GPTQ, "sym": "False", "dynamic": None, "checkpoint_format": None}),
    (GPTQ, {**GPTQ, "modules_in_block_to_quantize": "self_attn.q_proj"}),
    (GPTQ, {**GPTQ, "modules_in_block_to_quantize": None, "static_groups": None, "what": [1]}),
    (GPTQ, {**GPTQ, "dynamic": {".*q_proj": None}}),
    ({**GPTQ, "bits": 8}, {**GPTQ, "dynamic": {".*q_proj": {"bits": "8", "group_size": None}}}),
    (AWQ, {**AWQ, "bits": "4", "group_size": "128", "zero_point": "true", "version": None}),
    ({**AWQ, "zero_point": False}, {**AWQ, "zero_point": "false"}),
    (AWQ, {**AWQ, "modules_to_not_convert": "lm_head"}),
    (AWQ, {**AWQ, "modules_to_not_convert": None, "dynamic": None, "lm_head": None}),
    (AUTO_ROUND, {**AUTO_ROUND, "bits": "4", "act_bits": "16", "data_type": None, "sym": None}),
    (AUTO_ROUND, {**AUTO_ROUND, "extra_config": {Q: None}, "block_name_to_quantize": [[None]]}),
    ({**AUTO_ROUND, "bits": 8}, {**AUTO_ROUND, "extra_config": {Q: {"bits": "8", "sym": None}}}),
    (groups((["Linear"], INT4)), groups(("Linear", {**INT4, "num_bits": "4"}))),  # type: ignore[arg-type]
    (groups((["Linear"], INT4)), groups(([["Linear"], None], {**INT4, "group_size": 128.0}))),  # type: ignore[list-item]
    (groups((["Linear"], INT4)), groups((["Linear"], {**INT4, "symmetric": "true"}), ignore="x")),
    (groups((["Linear"], INT4)), groups((["Linear"], {**INT4, "symmetric": None}), ignore=None)),
    (
        groups((["Linear"], INT4)),
        groups((["Linear"], {**INT4, "actorder": None, "type": None, "observer": {}})),
    ),
    (
        groups((["Linear"], INT4)),
        groups((["Linear"], INT4), kv_cache_scheme=None, sparsity_config={}, transform_config=None),
    ),
]


@pytest.mark.parametrize(("usual", "written"), WRITTEN_OTHERWISE)
def test_what_can_only_mean_one_thing(usual: dict[str, Any], written: dict[str, Any]) -> None:
    assert resolve(written) == resolve(usual)
    assert format_of(written) is format_of(usual) is not None


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({**GPTQ, "bits": [4]}, ("quantization_config.bits", "[4]", "int")),
        ({**GPTQ, "desc_act": "maybe"}, ("desc_act", "'maybe'", "true or false")),
        ({**GPTQ, "sym": []}, ("sym", "[]", "true or false")),
        ({**GPTQ, "checkpoint_format": {"a": 1}}, ("checkpoint_format", "a text")),
        ({**GPTQ, "dynamic": {".*": {"bits": "x"}}}, ("dynamic .*.bits", "'x'", "int")),
        ({**GPTQ, "dynamic": {".*": [8]}}, ("dynamic .*", "[8]", "a map")),
        ({**AWQ, "zero_point": 7}, ("zero_point", 7, "true or false")),
        ({**AWQ, "modules_to_not_convert": {"a": 1}}, ("modules_to_not_convert", "a list")),
        ({**GPTQ, "group_size": 1e308}, ("group_size", "int")),
        ({**AWQ, "group_size": -5}, ("group_size", -5)),
        ({**AUTO_ROUND, "extra_config": ["a"]}, ("extra_config", "['a']", "a map")),
        ({**AUTO_ROUND, "extra_config": {Q: 8}}, ("extra_config", Q, 8, "a map")),
        ({**AUTO_ROUND, "extra_config": {Q: {"bits": {}}}}, ("extra_config", Q, "bits", "int")),
        ({**AUTO_ROUND, "act_bits": "few"}, ("act_bits", "'few'", "int")),
        (groups((4, INT4)), ("group_0.targets", 4, "a list of names")),  # type: ignore[arg-type]
        (groups((["Linear"], [INT4])), ("group_0.weights", "a map")),  # type: ignore[arg-type]
        (groups((["Linear"], {**INT4, "strategy": 3})), ("strategy", 3, "a text")),
        ({**groups(), "config_groups": [1]}, ("config_groups", "[1]", "a map")),
        ({**groups(), "config_groups": {"a": "b"}}, ("config_groups.a", "'b'", "a map")),
        (groups((["Linear"], INT4), ignore=7), ("ignore", 7, "a list of names")),
    ],
)
def test_what_is_wrong_is_named(config: dict[str, Any], complaint: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError, match=saying(*complaint)):
        read(config)


def read(config: dict[str, Any]) -> None:
    """As vLLM reads it: it asks who can, and then for each module."""
    if format_of(config) is not None:
        resolve(config)


def names_in(config: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all fields of a configuration."""
    found = []
    for key, value in config.items() if isinstance(config, dict) else ():
        found += [(*path, key), *names_in(value, (*path, key))]
    return found


FULL: list[dict[str, Any]] = [
    {
        **GPTQ,
        "sym": True,
        "desc_act": True,
        "lm_head": True,
        "pack_dtype": "int32",
        "checkpoint_format": "gptq",
        "is_marlin_format": False,
        "dynamic": {".*": {"bits": 4, "group_size": 64, "sym": True, "pack_dtype": "int32"}},
        "modules_in_block_to_quantize": [["self_attn.q_proj"]],
    },
    {**AWQ, "version": "gemm", "modules_to_not_convert": ["x"], "dynamic": {".*": {"bits": 4}}},
    {
        **AUTO_ROUND,
        "sym": True,
        "packing_format": "auto_round",
        "act_bits": 16,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "extra_config": {Q: {"bits": 4, "group_size": 64, "sym": False}},
    },
    groups(
        (["Linear"], {**INT4, "symmetric": True, "type": "int", "actorder": "group"}),
        ignore=["lm_head"],
        version="0.9",
        sparsity_config={"format": "dense"},
        transform_config={"config_groups": {}},
    ),
]


@pytest.mark.parametrize(
    ("config", "path"), [(config, path) for config in FULL for path in names_in(config)]
)
@pytest.mark.parametrize(
    "value", [None, True, 0, -7, 2.5, "", "x", [], [None], [["x"]], {}, {"x": None}, 10**30]
)
def test_any_value_in_any_field_is_read_or_refused(
    config: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    """Nothing but a ``ConfigError`` comes out of it."""

    def changed(node: Any, rest: tuple[Any, ...]) -> Any:
        return value if not rest else {**node, rest[0]: changed(node[rest[0]], rest[1:])}

    if path == ("quant_method",):
        return
    with contextlib.suppress(ConfigError):
        read(changed(config, path))
