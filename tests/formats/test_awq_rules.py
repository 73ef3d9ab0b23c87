# SPDX-License-Identifier: Apache-2.0
"""Which modules an AWQ configuration quantizes, and how: the rules of the tools that wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.described import Described
from tests.support.format_configs import AWQ, Q, bits_and_group, resolve
from tests.support.messages import saying, says
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.registry import parse
from vllm.compressed_linear.formats.resolution import ConfigError, Delegated
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


@pytest.mark.parametrize("word", ["exllama", "ipex", "gemx"])
@pytest.mark.parametrize(
    ("version", "dtype", "codes", "scales"),
    [
        ("gemm", "int32", (256, 16), (2, 128)),
        ("gemv", "int32", (128, 32), (128, 8)),
        ("gemv_fast", "int16", (32, 256), (8, 128)),
    ],
)
def test_versions_that_name_kernels_are_read_as_the_tensors_are(
    word: str, version: str, dtype: str, codes: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    headers = {
        f"{Q}.qweight": TensorHeader(dtype, codes, 0, "a"),
        f"{Q}.qzeros": TensorHeader("int32", (1,), 0, "a"),
        f"{Q}.scales": TensorHeader("float16", scales, 0, "a"),
    }
    found = Described.of({**AWQ, "version": word}, Headers(headers))
    assert found.resolve(Q) == resolve({**AWQ, "version": version})
    unknown = resolve({**AWQ, "version": word})
    assert isinstance(unknown, Delegated)
    assert says(unknown.reason, "AWQ", repr(word), version)


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"zero_point": False}, "zero_point: false"),
        ({"zero_point": None, "sym": True}, "sym: true"),
        ({"zero_point": False, "dynamic": {".*q_proj": {"sym": False}}}, ""),
        ({"dynamic": {".*q_proj": {"sym": True}}}, "sym: true"),
        ({}, ""),
    ],
)
def test_awq_files_without_zero_points_need_no_tensor_of_them(
    change: dict[str, Any], setting: str, version: str
) -> None:
    scheme = resolve({**AWQ, "version": version, **change})
    assert isinstance(scheme, CheckpointScheme)
    assert scheme.symmetric == setting
    optional = {tensor.name for tensor in scheme.tensors if tensor.optional}
    assert optional == ({"qzeros"} if setting else set())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bits": 8}, ("AWQ", 8)),
        ({"group_size": 0}, ("group_size", 0)),
    ],
)
def test_awq_configurations_that_say_nothing_possible(
    change: dict[str, Any], complaint: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigError, match=saying(*complaint)):
        parse({**AWQ, **change})
