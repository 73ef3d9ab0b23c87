# SPDX-License-Identifier: Apache-2.0
"""Mutators of configurations: nulls, wrong types, other values and hostile expressions in every
field of ``quantization_config``, and in the fields of config.json that the package reads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from tests.support.fuzzing.files import Mutant
from tests.support.fuzzing.tensors import Draw

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    4,
    8,
    16,
    64,
    128,
    2**31,
    2**63,
    -(2**63),
    10**400,
    0.5,
    4.0,
    128.0,
    -1.5,
    1e308,
    float("inf"),
    "",
    "4",
    "128",
    "four",
    "true",
    "false",
    "null",
    "gptq",
    "gptq_v2",
    "gemm",
    "marlin",
    "torch.int32",
    "int64",
    "\0",
    "\ud800",
    "x" * 10_000,
    [],
    [None],
    [[]],
    [1],
    ["Linear"],
    [["a"], "b"],
    {},
    {"a": None},
    {"": {}},
    {"re:(": {}},
)

HOSTILE = (
    "(a+)+$",
    "([a-z.]+)+X",
    "(.*)*(.*)*X",
    "(.*.*)*X",
    "(?:.|.)*X",
    "(.*,)*\\d{50}X",
    "(\\w+\\.?)+#",
    "((a*)*)*b",
    "(?:(?:.*)+)+!",
    ".*" * 40 + "X",
    "(?=(.*))" * 20 + "X",
    "(x{0,999}){0,999}y",
    "(",
    "[",
    "*",
    "a{9999999999999}",
    "(?P<a>",
    "\\",
    "(?<=.*)x",
    "(" * 2000 + ")" * 2000,
    "(?:" * 2000 + ".*" + ")*" * 2000 + "X",
    "x" * 200_000,
    "[[:alpha:]]",
    "(?:model){e<=3}.*",
    "(?i:.*LAYERS\\.[01]\\.)",
    ".*",
    "",
    "(?R)",
    "\\p{L}+",
    "(?|a|b)",
    "\u202e",
)

FIELDS = ("dynamic", "ignore", "targets", "modules_to_not_convert", "extra_config")
FIELDS += ("modules_in_block_to_quantize", "block_name_to_quantize", "to_quant_block_names")


def field_value(draw: Draw, mutant: Mutant) -> None:
    """Another value in any field, however deep, or no value."""
    config = mutant.quantization
    if not config:
        return
    paths = sorted(_paths(config), key=str)
    path = draw(st.sampled_from(paths))
    parent, key = _parent(config, path), path[-1]
    drop = draw(st.sampled_from([False, False, False, True]))
    if drop and isinstance(parent, dict):
        del parent[key]
        value: Any = "dropped"
    else:
        value = parent[key] = _value(draw)
    _done(mutant, path, value)


def new_field(draw: Draw, mutant: Mutant) -> None:
    """A field that the configuration lacks."""
    config = mutant.quantization
    names = ("bits", "w_bit", "group_size", "q_group_size", "sym", "zero_point", "desc_act")
    names += ("is_marlin_format", "lm_head", "pack_dtype", "format", "version", *FIELDS)
    names += ("sparsity_config", "transform_config", "kv_cache_scheme", "act_bits", "data_type")
    name = draw(st.sampled_from([name for name in names if name not in config]))
    config[name] = _value(draw)
    _done(mutant, (name,), config[name])


def hostile_expression(draw: Draw, mutant: Mutant) -> None:
    config = mutant.quantization
    text = draw(st.sampled_from(HOSTILE))
    method = config.get("quant_method")
    if method == "compressed-tensors":
        entry = f"re:{text}"
        if draw(st.booleans()):
            config["ignore"] = [*_list(config.get("ignore")), entry]
            path: tuple[Any, ...] = ("ignore",)
        else:
            groups = config.get("config_groups")
            group = next(iter(groups), None) if isinstance(groups, dict) else None
            if group is None or not isinstance(groups[group], dict):
                return
            groups[group]["targets"] = [entry]
            path = ("config_groups", group, "targets")
    elif method == "auto-round":
        config["extra_config"] = _map(config.get("extra_config")) | {text: {"bits": 16}}
        path = ("extra_config",)
    else:
        sign = draw(st.sampled_from(["-:", "+:", ""]))
        config["dynamic"] = {f"{sign}{text}": {}, **_map(config.get("dynamic"))}
        path = ("dynamic",)
    _done(mutant, path, text)


def whole(draw: Draw, mutant: Mutant) -> None:
    """The configuration itself is something else, or config.json has other fields that we read."""
    key = draw(st.sampled_from(["quantization_config", "text_config", "compression_config"]))
    value = _value(draw)
    mutant.config[key] = value
    _done(mutant, (key,), value)


def _value(draw: Draw) -> Any:
    return copy.deepcopy(draw(st.sampled_from(VALUES)))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _done(mutant: Mutant, path: tuple[Any, ...], value: Any) -> None:
    mutant.about += [str(part) for part in path if isinstance(part, str)]
    mutant.about += ["quantization_config", "quant_method", "config.json"]
    # A configuration adds nothing to tensors that tell their own layout; where it decides what
    # they mean, the mutant says another thing (``meanings``).
    mutant.harmless = True
    text = repr(value)
    mutant.done.append(f"config {'.'.join(map(str, path))} = {text[:80]}")


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        if key == "meta" and not prefix:
            continue  # notes of the tool
        yield (*prefix, key)
        yield from _paths(inner, (*prefix, key))


def _parent(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


MUTATORS = (field_value, field_value, field_value, new_field, hostile_expression, whole)
