# SPDX-License-Identifier: Apache-2.0
"""Configurations of methods that this package does not read are left to vLLM, with a sentence on
what they are and what runs them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.hub.checkpoints import published
from vllm.compressed_linear.formats.registry import format_of, parse, why_not_read
from vllm.compressed_linear.formats.resolution import ConfigError

KNOWN = {
    "ISTA-DASLab-FPQuant": "transformers runs it with the package fp_quant",
    "pytorch-Qwen3-8B-INT4": "vLLM runs it with the package torchao",
    "user13-Qwen3.6-35B-A3B-DFlash-exl3-3.50bpw": "exllamav3 runs it on NVIDIA GPUs",
    "user2-Llama-2-7b-AQLM-2Bit-1x16-hf": "transformers runs it with the package aqlm",
}


@pytest.mark.parametrize("name", KNOWN)
def test_published_configurations_of_other_methods_say_what_runs_them(name: str) -> None:
    config = published()[name].quantization
    assert format_of(config) is None
    assert KNOWN[name] in why_not_read(config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gguf"}, "llama.cpp"),
        ({"quant_method": "hqq"}, "the package hqq"),
        ({"quant_method": "new"}, "'new' is not known (read here: auto-round, awq,"),
        ({"config_groups": {}}, "no quant_method (keys: config_groups)"),
    ],
)
def test_what_is_not_read_is_left_to_vllm_with_a_reason(config: dict[str, Any], said: str) -> None:
    assert format_of(config) is None
    assert said in why_not_read(config)


def test_an_unknown_method_that_was_asked_for_is_an_error_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="AQLM"):
        parse({"quant_method": "aqlm"})
