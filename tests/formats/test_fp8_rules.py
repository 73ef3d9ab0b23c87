# SPDX-License-Identifier: Apache-2.0
"""What a configuration with ``quant_method: fp8`` or ``fbgemm_fp8`` says of a module, and what the
file says first."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.described import Described
from tests.support.format_configs import Q, resolve
from tests.support.messages import saying
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.fbgemm_fp8 import FbgemmFp8
from vllm.compressed_linear.formats.fp8 import Fp8
from vllm.compressed_linear.formats.registry import format_of, parse
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.scheme import CheckpointScheme

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = FP8 | {"weight_block_size": [128, 128]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
N, K = 320, 256


def headers(**tensors: tuple[str, tuple[int, ...]]) -> Headers:
    """Tensors of ``Q`` and what else is named, with dtypes and shapes."""
    return Headers(
        {
            (name.replace("__", ".") if "__" in name else f"{Q}.{name}"): TensorHeader(
                dtype, shape, 1, "model.safetensors"
            )
            for name, (dtype, shape) in tensors.items()
        }
    )


CODES = ("float8_e4m3fn", (N, K))


def of_file(
    config: dict[str, Any], kind: LayerKind = LayerKind.LINEAR, module: str = Q, **tensors: Any
) -> Resolution:
    return Described.of(config, headers(**tensors)).resolve(module, kind)


def axes(resolution: Resolution) -> tuple[str, str, tuple[str | int, ...]]:
    """(granularity, name and axes of the scales)."""
    assert isinstance(resolution, CheckpointScheme)
    assert resolution.weight.scale is not None
    scale = resolution.tensors[1]
    return resolution.weight.scale.granularity, scale.name, scale.axes


@pytest.mark.parametrize(
    ("config", "name", "shape", "expected"),
    [
        (FP8, "weight_scale", (), ("tensor", (1,))),
        (FP8, "weight_scale", (1, 1), ("tensor", (1,))),
        (FP8, "weight_scale", (N,), ("channel", ("N",))),
        (FP8, "weight_scale", (N, 1), ("channel", ("N", 1))),
        (FP8, "weight_scale_inv", (), ("tensor", (1,))),
        # One for each part of a tensor that is fused on disk.
        (FP8, "weight_scale", (3,), ("tensor", (1,))),
        (BLOCKS, "weight_scale_inv", (3, 2), ("block", ("B", "G"))),
        (BLOCKS, "weight_scale", (3, 2), ("block", ("B", "G"))),
        (BLOCKS, "scale", (3, 2), ("block", ("B", "G"))),
        (BLOCKS, "weight_scale", (3, 1, 2, 1), ("block", ("B", 1, "G", 1))),
        (BLOCKS, "weight_scale_inv", (N, 1), ("channel", ("N", 1))),
        (BLOCKS, "weight_scale_inv", (), ("tensor", (1,))),
        # Wrong shapes are found while loading.
        (BLOCKS, "weight_scale_inv", (2, 2), ("block", ("B", "G"))),
    ],
)
def test_the_shape_of_scales_tells_what_shares_them(
    config: dict[str, Any],
    name: str,
    shape: tuple[int, ...],
    expected: tuple[str, tuple[str | int, ...]],
) -> None:
    found = of_file(config, weight=CODES, **{name: ("float32", shape)})
    assert axes(found) == (expected[0], name, expected[1])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FP8, ("tensor", "weight_scale", (1,))),
        (BLOCKS, ("block", "weight_scale_inv", ("B", "G"))),
        (FBGEMM, ("channel", "weight_scale", ("N", 1))),
    ],
)
def test_without_a_file_the_configuration_tells(
    config: dict[str, Any], expected: tuple[str, str, tuple[str | int, ...]]
) -> None:
    assert axes(resolve(config)) == expected


@pytest.mark.parametrize(
    ("config", "input_scale", "expected"),
    [
        (FP8, False, "e4m3 dynamic per token"),
        (FP8, True, "e4m3 dynamic per token"),
        (FP8 | {"activation_scheme": "static"}, False, "e4m3 static per tensor"),
        ({"quant_method": "fp8"}, True, "e4m3 static per tensor"),
        ({"quant_method": "fp8"}, False, "e4m3 dynamic per token"),
        (BLOCKS, False, "e4m3 dynamic per group"),
        (BLOCKS | {"scale_fmt": "ue8m0"}, False, "e4m3 dynamic per group with e8m0 scales"),
        (BLOCKS | {"scale_fmt": None}, False, "e4m3 dynamic per group"),
        ({"quant_method": "fp8", "method": "fp8"}, False, None),
        (FBGEMM, False, "e4m3 dynamic per token"),
    ],
)
def test_how_x_is_quantized(
    config: dict[str, Any], input_scale: bool, expected: str | None
) -> None:
    given = {"input_scale": ("float32", ())} if input_scale else {}
    found = of_file(config, weight=CODES, weight_scale=("float32", (1,)), **given)
    assert isinstance(found, CheckpointScheme)
    assert (None if found.activation is None else found.activation.kind) == expected


@pytest.mark.parametrize("field", ["ignored_layers", "modules_to_not_convert"])
@pytest.mark.parametrize("config", [FP8, BLOCKS])
@pytest.mark.parametrize(
    ("entry", "excluded"),
    [
        (Q, True),
        (f"{Q}.weight", True),
        ("self_attn", True),
        ("q_proj", True),
        ("model.layers.1", True),
        ("model.layers.1.", True),
        ("model.layers.10", False),
        ("proj", False),
        ("q", False),
        ("k_proj", False),
        ("lm_head", False),
    ],
)
def test_entries_are_whole_components_of_names(
    config: dict[str, Any], field: str, entry: str, excluded: bool
) -> None:
    found = resolve({**config, field: [entry]})
    assert isinstance(found, Unquantized) is excluded


def test_gate_does_not_exclude_gate_proj() -> None:
    config = FP8 | {"modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
    assert isinstance(resolve(config, "model.layers.0.mlp.gate"), Unquantized)
    assert isinstance(resolve(config, "model.layers.0.mlp.gate_proj"), CheckpointScheme)


@pytest.mark.parametrize("config", [FP8, FBGEMM])
def test_a_part_of_a_name_yields_to_codes_in_the_file_and_a_full_name_does_not(
    config: dict[str, Any],
) -> None:
    tensors = {"weight": CODES, "weight_scale": ("float32", (N, 1))}
    assert isinstance(
        of_file(config | {"modules_to_not_convert": ["self_attn"]}, **tensors), CheckpointScheme
    )
    described = Described.of(config | {"modules_to_not_convert": [Q]}, headers(**tensors))
    found = described.resolve(Q)
    assert isinstance(found, Unquantized)
    with pytest.raises(ConfigError, match=saying(f"{Q}.weight", "float8_e4m3fn", "unquantized")):
        described.file.check_against_file(Q, Q, found)


@pytest.mark.parametrize("config", [FP8, BLOCKS, FBGEMM])
def test_a_plain_weight_in_the_file_goes_first(config: dict[str, Any]) -> None:
    assert isinstance(of_file(config, weight=("bfloat16", (N, K))), Unquantized)
    # With scales next to it, it is damaged, which loading finds.
    scales = {"weight_scale": ("float32", (1,))}
    assert isinstance(of_file(config, weight=("bfloat16", (N, K)), **scales), CheckpointScheme)


@pytest.mark.parametrize("config", [FP8, BLOCKS, FBGEMM])
def test_codes_without_scales_are_an_error(config: dict[str, Any]) -> None:
    described = Described.of(config, headers(weight=CODES))
    found = described.resolve(Q)
    scale = "weight_scale_inv" if "weight_block_size" in config else "weight_scale"
    with pytest.raises(ConfigError, match=saying(f"{Q}.{scale}", "not in the checkpoint")):
        described.file.check_against_file(Q, Q, found)


def test_heads_and_tables_are_quantized_if_the_file_says_so() -> None:
    for kind, module in ((LayerKind.HEAD, "lm_head"), (LayerKind.EMBEDDING, "model.embed_tokens")):
        assert isinstance(resolve(FP8, module, kind), Unquantized)
        tensors = {f"{module.replace('.', '__')}__weight": CODES}
        found = of_file(FP8, kind, module, **tensors)
        assert isinstance(found, CheckpointScheme)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"activation_scheme": "sometimes"}, ("activation_scheme", "'sometimes'")),
        ({"weight_block_size": 128}, ("weight_block_size", 128)),
        ({"weight_block_size": [128]}, ("weight_block_size", "[128]")),
        ({"weight_block_size": [0, 128]}, ("weight_block_size", "[0, 128]")),
        ({"weight_block_size": ["a", 128]}, ("weight_block_size", "int")),
        ({"weight_scale_semantics": "squared"}, ("weight_scale_semantics", "'squared'")),
        ({"ignored_layers": 5}, ("ignored_layers", 5)),
    ],
)
def test_wrong_values_are_errors(change: dict[str, Any], complaint: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError, match=saying(*complaint)):
        parse(FP8 | change)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_block_size": None},
        {"weight_block_size": []},
        {"ignored_layers": None},
        {"modules_to_not_convert": None, "dequantize": False},
        {"activation_scheme": "Dynamic"},
        {"fmt": "e4m3"},
        {"quant_method": "FP8"},
    ],
)
def test_these_mean_the_same(change: dict[str, Any]) -> None:
    assert resolve(FP8 | change) == resolve(FP8)


def test_blocks_as_text_and_one_name_as_text() -> None:
    assert resolve(BLOCKS | {"weight_block_size": ["128", 128.0]}) == resolve(BLOCKS)
    assert isinstance(resolve(FP8 | {"ignored_layers": "q_proj"}), Unquantized)


def test_they_are_claimed() -> None:
    assert format_of(FP8) is Fp8
    assert format_of(FBGEMM) is FbgemmFp8


def test_vllms_own_configuration_is_complete() -> None:
    name, config = parse({"quant_method": "fp8"}).delegated()
    assert name == "fp8"
    assert config["activation_scheme"] == "dynamic"
