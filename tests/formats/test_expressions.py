# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of configurations: those of tools as ``re`` has them, all in bounded time."""

from __future__ import annotations

import pickle
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.described import Described
from tests.support.messages import saying, says
from vllm.compressed_linear.formats import expressions
from vllm.compressed_linear.formats.expressions import TimedMatching, expression
from vllm.compressed_linear.formats.resolution import ConfigError

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in range(12)
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.experts.7.up_proj")
]
LONG = "model." + "a" * 400

TOOLS = [
    r".*",
    r".*\.layers\.1\..*",
    r".*layers\.(0|1|2)\.mlp\.(gate|up|down)_proj.*",
    r"model\.layers\.\d+\.mlp\.down_proj$",
    r"^(?!.*experts).*_proj",
    r".*self_attn.*[qkv]_proj",
    r"(?:.*\.)?layers\.1[01]?\.",
    r"(?i:.*EXPERTS\.\d{1,3}\..*)",
    r".*(?<!o_proj)$",
    "model.layers.1.mlp",
    r"(?P<block>.*)\.mlp",
    r"[^.]+\.layers\.[^.]+\.mlp",
    "|".join(rf".*layers\.{n}\.mlp.*" for n in range(40)),
]

HOSTILE = [
    "(a|a)*$",
    "(.|.)*$x",
    "(a+)+$",
    "(.*)*$x",
    r"(\w+\.?)+\Zx",
    "((.*)*)*$x",
    "(?:(?:.*)+)+$x",
    ".*" * 12 + "$x",
    "(a|b|ab|ba|.)*$x",
    ".?" * 60 + "." * 60 + "$x",
    "(?:a|.|b)(?:a|.|b)" * 40 + "$x",
    r"(.*)\1\1\1.*\1.*$x",
    "(?=(.*.*.*.*.*)*$x)",
    "(.{0,99}){0,99}$x",
]


@pytest.mark.parametrize("text", TOOLS)
def test_expressions_of_tools_are_matched_by_re(text: str) -> None:
    """So they mean exactly what they mean there, at its speed."""
    assert expression(text).bounded is None
    matching = TimedMatching("ignore")
    for name in [*NAMES, LONG]:
        assert matching.matches(text, [name], text) == bool(re.match(text, name))
        assert matching.matches(text, [name], text, search=True) == bool(re.search(text, name))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_expressions_end_in_an_error_or_a_match_within_seconds(text: str) -> None:
    matching = TimedMatching("ignore")
    begun = time.process_time()
    error = ""
    try:
        for name in [*NAMES, LONG, "a" * 100] * 20:
            matching.matches(text, [name], f"re:{text}")
    except ConfigError as caught:
        error = str(caught)
    assert time.process_time() - begun < 15
    assert not error or says(error, "ignore", ascii(f"re:{text}"), "takes too long")


def test_a_hostile_expression_is_named_with_its_field() -> None:
    matching = TimedMatching("dynamic")
    with pytest.raises(ConfigError, match=saying("dynamic", "'-:(a|a)*$'", "takes too long")):
        matching.matches("(a|a)*$", ["a" * 60 + "!"], "-:(a|a)*$")


def test_many_slow_matches_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "FIELD_SECONDS", 0.05)
    text = ".*.*.*$x"
    assert expression(text).bounded is None
    matching = TimedMatching("ignore")
    with pytest.raises(ConfigError, match=saying("ignore", "takes too long")):
        matching.matches(text, ["a" * 100] * 100_000, text)


def test_a_hundred_thousand_matches_of_a_tool_are_no_slow_ones() -> None:
    matching = TimedMatching("ignore")
    for layer in range(2000):
        for text in TOOLS:
            matching.matches(text, [f"model.layers.{layer}.mlp.down_proj"] * 4, text)


@given(
    st.from_regex(r"[a-c.*?+|()\[\]{}0-9,^$\\d-]{0,12}", fullmatch=True),
    st.text("abc.1", max_size=9),
)
def test_every_expression_matches_as_re_does(text: str, name: str) -> None:
    try:
        plain = re.compile(text)
    except (re.error, OverflowError):
        with pytest.raises(ConfigError):
            expression(text)
        return
    for bounded in (None, ...):
        if bounded is not None:
            try:
                found = expressions._for_regex(text)
            except ConfigError:
                continue
            assert bool(found.match(name)) == bool(plain.match(name))
            assert bool(found.search(name)) == bool(plain.search(name))
        else:
            assert TimedMatching("f").matches(text, [name], text) == bool(plain.match(name))


INVALID = {
    "an open group": ("(", ("regular expression",)),
    "an open set": ("[", ("regular expression",)),
    "nothing to repeat": ("*", ("regular expression",)),
    "too many repetitions": ("a{99999999999999}", ("regular expression",)),
    "a variable look-behind": ("(?<=.*)x", ("regular expression",)),
    "recursion": ("(?R)", ("regular expression",)),
    "a thousand groups in one another": ("(" * 5000 + ")" * 5000, ("nested",)),
    "too long": ("x" * 100_000, (100_000, 65536)),
    "fuzzy, as only regex has it": ("(?:a|b|.)*{e<=1}", ("too complex",)),
}


@pytest.mark.parametrize("text", [v[0] for v in INVALID.values()], ids=list(INVALID))
def test_invalid_expressions_are_named_with_field_and_entry(text: str) -> None:
    complaint = next(c for t, c in INVALID.values() if t == text)
    with pytest.raises(ConfigError, match=saying("ignore", "'re:", *complaint)):
        TimedMatching("ignore").compiled(text, f"re:{text}")


FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("dynamic", {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"EVIL": {}}}),
    ("dynamic", {"quant_method": "awq", "bits": 4, "group_size": 128, "dynamic": {"-:EVIL": {}}}),
    (
        "extra_config",
        {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": 128,
            "extra_config": {"EVIL": {"bits": 16}},
        },
    ),
    ("ignore", {"ignore": ["re:EVIL"]}),
    ("targets", {"targets": ["re:EVIL"]}),
]


@pytest.mark.parametrize(("field", "config"), FORMATS, ids=lambda value: str(value)[:30])
def test_every_field_of_every_format_is_bounded(field: str, config: dict[str, Any]) -> None:
    if "quant_method" not in config:
        group = {"weights": {"num_bits": 4, "group_size": 128, "strategy": "group"}}
        group["targets"] = config.get("targets", ["Linear"])
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group},
            "ignore": config.get("ignore", []),
        }
    evil = "(a|a)*$"
    described = Described.of(_replaced(config, evil))
    with pytest.raises(ConfigError, match=saying(field, evil, "takes too long")):
        described.resolve("a" * 60 + "!")


def _replaced(value: Any, evil: str) -> Any:
    if isinstance(value, dict):
        return {_replaced(k, evil): _replaced(v, evil) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(v, evil) for v in value]
    return value.replace("EVIL", evil) if isinstance(value, str) else value


def test_a_format_with_compiled_expressions_reaches_vllms_other_process() -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*q_proj": {}}}
    described = Described.of(config)
    before = described.resolve("model.q_proj")
    copied = pickle.loads(pickle.dumps(described.format))
    assert copied == described.format
    assert Described(copied, described.file).resolve("model.q_proj") == before
