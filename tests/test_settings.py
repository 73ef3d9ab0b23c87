# SPDX-License-Identifier: Apache-2.0
"""What users can ask for by environment variable and by ``--additional-config``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.messages import saying
from vllm.compressed_linear import settings
from vllm.compressed_linear.settings import BackendRules, Settings, enabled

QKV = "model.layers.0.self_attn.qkv_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        settings.ENABLE,
        settings.BACKEND,
        settings.STRICT,
        settings.PLAN_FILE,
        settings.CACHE,
        settings.ALLOW_MISSING,
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "qkv", "down", "unquantized"),
    [
        ("", None, None, None),
        ("reference", "reference", "reference", None),
        ("*.down_proj=reference", None, "reference", "reference"),
        ("*.down_proj=a,b", "b", "a", "a"),
        ("b,*.down_proj=a", "b", "b", "a"),  # the first match wins
        ("unquantized=a", None, None, "a"),
        ("unquantized=a,b", "b", "b", "a"),
        ("*=a", "a", "a", None),
        (" *.qkv_proj = a , , b ", "a", "b", None),
        ("model.layers.[1-9].*=a", None, None, None),
        ("model.layers.?.mlp.*=a", None, "a", "a"),
        ("*.mlp.*=a,unquantized=b", None, "a", "a"),
    ],
)
def test_backend_rules(text: str, qkv: str | None, down: str | None, unquantized: str) -> None:
    rules = BackendRules.parse(text)
    assert rules.backend_for(QKV, quantized=True) == qkv
    assert rules.backend_for(DOWN, quantized=True) == down
    assert rules.backend_for(DOWN, quantized=False) == unquantized


@pytest.mark.parametrize("text", ["=cpu", "*.down_proj=", "a,=b", "="])
def test_rules_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=saying(settings.BACKEND, "NAME", "PATTERN=NAME")):
        BackendRules.parse(text)


@pytest.mark.parametrize(
    ("variable", "given", "file"),
    [
        ("", {}, "/cache/vllm-compressed-linear/tune.json"),
        ("", {"tune_file": "a.json"}, "a.json"),
        ("b.json", {"tune_file": "a.json"}, "b.json"),
        ("off", {"tune_file": "a.json"}, ""),
        ("", {"tune_file": "off"}, ""),
    ],
)
def test_where_measurements_are_looked_for(
    variable: str, given: dict[str, str], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv(settings.TUNE_FILE, variable)
    assert Settings.read({"compressed_linear": given}).tune_file == file


def test_nothing_asked_for() -> None:
    assert Settings.read() == Settings.read({}) == Settings.read({"other": {"a": 1}}) == Settings()
    assert enabled()


def test_additional_config_is_read() -> None:
    given = {"backend": "reference", "strict": True, "plan_file": "plan.json", "cache": "a"}
    given |= {"allow_missing": True}
    found = Settings.read({"compressed_linear": given})
    rules = BackendRules.parse("reference")
    assert found == Settings(rules, True, "plan.json", cache="a", allow_missing=True)


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.BACKEND, "cpu")
    monkeypatch.setenv(settings.STRICT, "0")
    monkeypatch.setenv(settings.PLAN_FILE, "b.json")
    monkeypatch.setenv(settings.CACHE, "b")
    monkeypatch.setenv(settings.ALLOW_MISSING, "0")
    given = {"backend": "reference", "strict": True, "plan_file": "a.json", "cache": "a"}
    given |= {"allow_missing": True}
    found = Settings.read({"compressed_linear": given})
    assert found == Settings(BackendRules.parse("cpu"), False, "b.json", cache="b")


@pytest.mark.parametrize("given", [{"backends": "cpu"}, {"Strict": True, "backend": "cpu"}])
def test_unknown_keys_are_refused(given: dict[str, Any]) -> None:
    unknown = next(key for key in given if key != "backend")
    with pytest.raises(ValueError, match=saying(unknown, "backend, cache, plan_file")):
        Settings.read({"compressed_linear": given})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", False), ("1", True), ("off", False), ("TRUE", True), ("", True), (" ", True)],
)
def test_the_switch(text: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.ENABLE, text)
    assert enabled() is expected


def test_a_switch_that_is_neither_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.STRICT, "maybe")
    with pytest.raises(ValueError, match=saying(settings.STRICT, "'maybe'", 1, 0)):
        Settings.read()


@pytest.mark.needs_vllm
def test_vllm_knows_our_variables_after_the_plugin_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    from vllm.compressed_linear.plugin import register

    register()
    for name in settings.VARIABLES:
        monkeypatch.setenv(name, "1")
    # Raises for a VLLM_ variable that nobody announced.
    current_platform.validate_environ(hard_fail=True)


@pytest.mark.needs_vllm
def test_values_of_our_variables_are_no_part_of_the_compile_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import vllm.envs as envs

    from vllm.compressed_linear.plugin import register

    register()
    before = envs.compile_factors()
    monkeypatch.setenv(settings.PLAN_FILE, "elsewhere.json")
    assert envs.compile_factors() == before
    assert "VLLM_COMPRESSED_LINEAR_PLAN" in before
