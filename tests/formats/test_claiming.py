# SPDX-License-Identifier: Apache-2.0
"""What each format takes, and what it leaves: the same rules for all of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.described import Described
from tests.support.format_configs import (
    AUTO_ROUND,
    AWQ,
    BLOCKS,
    FLOAT4,
    FLOAT8,
    GPTQ,
    INT4,
    INT8,
    NVFP4,
    Q,
    groups,
)
from tests.support.messages import saying, says
from vllm.compressed_linear.checkpoint.completeness import unmatched
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.registry import format_of, parse, why_not_read
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Unquantized,
)
from vllm.compressed_linear.spec.scheme import CheckpointScheme

MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
QUARK_FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False}
QUARK_INT4 = {
    "dtype": "int4",
    "qscheme": "per_group",
    "group_size": 128,
    "ch_axis": 1,
    "is_dynamic": False,
    "symmetric": True,
}
QUARK_FP4 = {**QUARK_INT4, "dtype": "fp4", "group_size": 32, "scale_format": "e8m0"}


def quark(weight: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "quark", "global_quant_config": {"weight": weight}}


def compressed(weights: dict[str, Any], form: str) -> dict[str, Any]:
    return groups((["Linear"], weights), format=form)


FLOATS = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"}
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": (GPTQ, "dynamic"),
    "awq": (AWQ, "modules_to_not_convert"),
    "auto-round": (AUTO_ROUND, "extra_config"),
    "auto-round mxfp4": (
        {**FLOATS, "act_bits": 16, "packing_format": "auto_round:llm_compressor"},
        "extra_config",
    ),
    "fp8": ({"quant_method": "fp8"}, "modules_to_not_convert"),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "ignored_layers"),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, "modules_to_not_convert"),
    "pack-quantized": (compressed(INT4, "pack-quantized"), "ignore"),
    "int-quantized": (compressed(INT8, "int-quantized"), "ignore"),
    "float-quantized": (compressed({**FLOAT8, "strategy": "channel"}, "float-quantized"), "ignore"),
    "float-quantized blocks": (compressed({**FLOAT8, **BLOCKS}, "float-quantized"), "ignore"),
    "nvfp4-pack-quantized": (compressed(NVFP4, "nvfp4-pack-quantized"), "ignore"),
    "mxfp4-pack-quantized": (
        compressed({**FLOAT4, "strategy": "group", "group_size": 32}, "mxfp4-pack-quantized"),
        "ignore",
    ),
    "modelopt FP8": (MODELOPT, "exclude_modules"),
    "modelopt NVFP4": ({**MODELOPT, "quant_algo": "NVFP4"}, "ignore"),
    "modelopt W4A16_AWQ": ({**MODELOPT, "quant_algo": "W4A16_AWQ", "group_size": 128}, "ignore"),
    "quark fp8": (quark(QUARK_FP8), "exclude"),
    "quark int4": (quark(QUARK_INT4), "exclude"),
    "quark mxfp4": (quark(QUARK_FP4), "exclude"),
}
"""A configuration of each kind of weight, and its field that leaves modules unquantized."""


def excluding(method: str, module: str) -> dict[str, Any]:
    config, field = METHODS[method]
    if method == "awq":  # parts of names within a block
        module = module.rpartition(".")[2]
    if field == "dynamic":
        return {**config, field: {f"-:{module}": {}}}
    return {**config, field: {module: {"bits": 16}} if field == "extra_config" else [module]}


def with_weight(config: dict[str, Any], dtype: str) -> Described:
    """A file in which ``Q`` has a weight of this dtype, and no other module has a tensor."""
    weight = TensorHeader(dtype, (256, 512), 0, "model.safetensors")
    return Described.of(config, Headers({f"{Q}.weight": weight}))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_is_taken(method: str) -> None:
    config, _ = METHODS[method]
    assert format_of(config) is type(parse(config))
    assert isinstance(Described.of(config).resolve(Q), CheckpointScheme)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_a_plain_weight_on_disk_goes_first(method: str, dtype: str) -> None:
    described = with_weight(METHODS[method][0], dtype)
    found = described.resolve(Q)
    assert isinstance(found, Unquantized)
    assert f"{Q}.weight" in found.reason
    described.file.check_against_file(Q, Q, found)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32"])
@pytest.mark.parametrize("method", METHODS)
def test_codes_in_a_weight_that_is_said_to_be_unquantized_are_an_error(
    method: str, dtype: str
) -> None:
    described = with_weight(excluding(method, Q), dtype)
    found = described.resolve(Q)
    if isinstance(found, Unquantized):
        assert METHODS[method][1] in found.reason
    with pytest.raises(ConfigError, match=saying(Q)) as error:
        described.file.check_against_file(Q, Q, found)
    assert says(str(error.value), "model.safetensors")
    assert says(str(error.value), "weight")


@pytest.mark.parametrize("method", METHODS)
def test_entries_that_match_no_module_are_one_warning(method: str) -> None:
    config = excluding(method, "model.layers.7.absent")
    described = with_weight(config, "bfloat16")
    found = described.format.unmatched_entries(described.file, {Q: LayerKind.LINEAR})
    field = METHODS[method][1]
    assert [name for name, _ in found] == [field]
    (warning,) = unmatched(found)
    assert "1 entry" in warning.message
    assert field in warning.message
    assert "absent" in warning.message


UNKNOWN = {
    "checkpoint_format of gptq": {**GPTQ, "checkpoint_format": "new"},
    "format of gptq": {**GPTQ, "format": "new"},
    "packing_format of auto-round": {**AUTO_ROUND, "packing_format": "auto_round:new"},
    "data_type of auto-round": {**AUTO_ROUND, "data_type": "new_fp"},
    "activation_scheme of fp8": {"quant_method": "fp8", "activation_scheme": "new"},
    "format of compressed-tensors": compressed(INT4, "new-quantized"),
    "strategy of compressed-tensors": compressed({**INT4, "strategy": "new"}, "pack-quantized"),
    "type of compressed-tensors": compressed({**INT4, "type": "new"}, "pack-quantized"),
    "quant_algo of modelopt": {**MODELOPT, "quant_algo": "NEW"},
    "dtype of quark": quark({**QUARK_FP8, "dtype": "new"}),
    "qscheme of quark": quark({**QUARK_FP8, "qscheme": "per_new"}),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_schemes_are_left_to_vllm_with_a_reason(what: str) -> None:
    config = UNKNOWN[what]
    assert format_of(config) is None
    assert "new" in why_not_read(config).lower()


def test_an_unknown_version_of_awq_is_left_to_vllm_if_the_file_does_not_tell() -> None:
    """Such words name kernels, and the shapes of tensors tell how they are stored."""
    found = Described.of({**AWQ, "version": "new"}).resolve(Q)
    assert isinstance(found, Delegated)
    assert "'new'" in found.reason
