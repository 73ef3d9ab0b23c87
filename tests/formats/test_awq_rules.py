# SPDX-License-Identifier: Apache-2.0
"""Which modules an AWQ configuration quantizes, and how: the rules of the tools that wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.described import Described
from tests.support.format_configs import AWQ, Q, bits_and_group, resolve
from tests.support.messages import saying
from vllm.compressed_linear.formats.registry import parse
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.spec.scheme import CheckpointScheme


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
