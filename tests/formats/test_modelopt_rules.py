# SPDX-License-Identifier: Apache-2.0
"""What a configuration of NVIDIA ModelOpt says of a module, and what the file says first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.described import Described
from tests.support.format_configs import Q, as_a_part, resolve
from tests.support.messages import saying, says
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.modelopt import ModelOpt
from vllm.compressed_linear.formats.modelopt_algorithms import MXFP4_INPUT, MXFP8_INPUT
from vllm.compressed_linear.formats.registry import format_of, parse, parse_in
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    Delegated,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.activation import quantize_dequantize
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": PRODUCER}
N, K = 256, 512
FILES: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "fp8": {"weight": ("float8_e4m3fn", (N, K)), "weight_scale": ("float32", ())},
    "channel": {"weight": ("float8_e4m3fn", (N, K)), "weight_scale": ("float32", (N,))},
    "blocks": {"weight": ("float8_e4m3fn", (N, K)), "weight_scale": ("float32", (2, 1, 4, 1))},
    "mxfp8": {"weight": ("float8_e4m3fn", (N, K)), "weight_scale": ("uint8", (N, K // 32))},
    "nvfp4": {
        "weight": ("uint8", (N, K // 2)),
        "weight_scale": ("float8_e4m3fn", (N, K // 16)),
        "weight_scale_2": ("float32", ()),
    },
    "mxfp4": {"weight": ("uint8", (N, K // 2)), "weight_scale": ("uint8", (N, K // 32))},
    "int4": {"weight": ("uint8", (N // 2, K)), "weight_scale": ("float32", (N, K // 128))},
    "int8": {"weight": ("int8", (N, K)), "weight_scale": ("float32", (N,))},
}


def headers(kind: str, module: str = Q, *, inputs: bool = False) -> Headers:
    """The tensors of one module."""
    tensors = FILES[kind] | ({"input_scale": ("float32", ())} if inputs else {})
    return Headers(
        {
            f"{module}.{name}": TensorHeader(dtype, shape, 1, "model.safetensors")
            for name, (dtype, shape) in tensors.items()
        }
    )


def in_words(resolution: Resolution) -> str:
    assert isinstance(resolution, CheckpointScheme), resolution
    kind = "" if resolution.activation is None else f" under {resolution.activation.kind}"
    scale = resolution.weight.scale
    assert scale is not None
    return f"{resolution.weight.element} {scale.granularity} {scale.group_size}{kind}"


STATIC = " under e4m3 static per tensor"
FP4_INPUT = " under e2m1 dynamic per group with e4m3 scales"
MX = " under e4m3 dynamic per group with e8m0 scales"
ALGORITHMS = [
    ("FP8", "fp8", True, f"e4m3 tensor -1{STATIC}"),
    ("fp8", "fp8", True, f"e4m3 tensor -1{STATIC}"),
    ("FP8_PER_CHANNEL_PER_TOKEN", "channel", False, "e4m3 channel -1 under e4m3 dynamic per token"),
    ("fp8_pb_wo", "blocks", False, "e4m3 block 128"),
    ("MXFP8", "mxfp8", False, f"e4m3 group 32{MX}"),
    ("NVFP4", "nvfp4", True, f"e2m1 group 16{FP4_INPUT}"),
    ("NVFP4_AWQ", "nvfp4", True, f"e2m1 group 16{FP4_INPUT}"),
    ("W4A16_NVFP4", "nvfp4", False, "e2m1 group 16"),
    ("W4A8_NVFP4_FP8", "nvfp4", True, f"e2m1 group 16{STATIC}"),
    ("mxfp4", "mxfp4", False, "e2m1 group 32"),
    ("W4A8_MXFP4_FP8", "mxfp4", True, f"e2m1 group 32{STATIC}"),
    ("W4A16_AWQ", "int4", False, "uint4b8 group 128"),
    ("W4A8_AWQ", "int4", True, f"uint4b8 group 128{STATIC}"),
    ("W8A16", "int8", False, "uint8b128 channel -1"),
    ("W8A8_SQ_PER_CHANNEL", "int8", True, "uint8b128 channel -1 under int8 static per tensor"),
]


@pytest.mark.parametrize(("algorithm", "kind", "inputs", "expected"), ALGORITHMS)
def test_algorithms(algorithm: str, kind: str, inputs: bool, expected: str) -> None:
    config = NVFP4 | {"quant_algo": algorithm}
    described = Described.of(config, headers(kind, inputs=inputs))
    found = described.resolve(Q)
    assert in_words(found) == expected
    described.file.check_against_file(Q, Q, found)
    assert format_of(config) is ModelOpt
    # Without a file the configuration tells.
    assert in_words(resolve(config)) == expected


@pytest.mark.parametrize(("algorithm", "kind", "inputs", "expected"), ALGORITHMS)
def test_the_tensors_decide_what_a_weight_is(
    algorithm: str, kind: str, inputs: bool, expected: str
) -> None:
    for other in ("FP8", "NVFP4", "W8A16"):
        if other in algorithm.upper():
            continue
        described = Described.of(NVFP4 | {"quant_algo": other}, headers(kind, inputs=inputs))
        found = described.resolve(Q)
        assert in_words(found).split()[:3] == expected.split()[:3]
        described.file.check_against_file(Q, Q, found)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_algo": "NVFP4", "producer": PRODUCER},
        {"quant_algo": "NVFP4"},
        {"producer": PRODUCER, "quantization": {"quant_algo": "NVFP4"}},
        {"quantization": {"quant_algo": "NVFP4", "exclude_modules": None, "group_size": None}},
        {"quant_method": "modelopt", "quantization": {"quant_algo": "nvfp4", "group_size": "16"}},
        NVFP4 | {"quant_method": "modelopt_fp4"},
        NVFP4 | {"quant_method": "ModelOpt"},
        NVFP4 | {"group_size": 16},
        NVFP4 | {"kv_cache_scheme": "FP8"},
    ],
)
def test_these_mean_the_same(config: dict[str, Any]) -> None:
    assert format_of(config) is ModelOpt
    assert resolve(config) == resolve(NVFP4)


@pytest.mark.parametrize("field", ["ignore", "exclude_modules"])
@pytest.mark.parametrize(
    ("entry", "excluded"),
    [
        (Q, True),
        ("model.layers.1*", True),
        ("model.layers.1.*", True),
        ("model.layers.1.self_attn*", True),
        ("*.self_attn.*", True),
        ("*q_proj", True),
        ("self_attn", True),
        ("model.layers.10*", False),
        ("layers.1*", False),
        ("*.mlp.*", False),
        ("q", False),
        ("lm_head", False),
    ],
)
def test_entries_are_wildcards_or_components(field: str, entry: str, excluded: bool) -> None:
    config: dict[str, Any] = {**NVFP4, field: [entry]}
    if field == "exclude_modules":
        config = {"quantization": {"quant_algo": "NVFP4", field: [entry]}}
    assert isinstance(resolve(config), Unquantized) is excluded
    # Codes in the file count, and so does a plain weight.
    assert isinstance(Described.of(config, headers("nvfp4")).resolve(Q), CheckpointScheme)
    plain = Described.of(NVFP4).with_file([f"{Q}.weight"])
    assert isinstance(plain.resolve(Q), Unquantized)


@pytest.mark.parametrize(
    "entry", ["model.layers.1.self_attn*", "model.layers.1*", "*.self_attn.*", Q]
)
def test_wildcards_are_written_for_names_in_the_checkpoint(entry: str) -> None:
    module = as_a_part(Q)
    described = Described.of({**NVFP4, "ignore": [entry]}).renamed(as_a_part)
    assert isinstance(described.resolve(module), Unquantized)
    entries = [("ignore", entry)]
    asked: dict[str, LayerKind | None] = {module: LayerKind.LINEAR}
    assert described.format.unmatched_entries(FileView(), asked) == []
    other: dict[str, LayerKind | None] = {"language_model.model.norm": LayerKind.LINEAR}
    assert described.format.unmatched_entries(FileView(), other) == entries


def test_mixed_precision() -> None:
    config = NVFP4 | {
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            Q: {"quant_algo": "FP8"},
            "model.layers.1.mlp": {"quant_algo": "W4A16_NVFP4", "group_size": 32},
            "model.layers.2.mlp": {"quant_algo": "NVFP4_SVD"},
            "lm_head": {"quant_algo": "NVFP4"},
        },
    }
    assert format_of(config) is ModelOpt
    assert in_words(resolve(config)) == f"e4m3 tensor -1{STATIC}"
    assert in_words(resolve(config, "model.layers.1.mlp.up_proj")) == "e2m1 group 32"
    assert isinstance(resolve(config, "model.layers.1.mlp_2.up_proj"), Unquantized)
    assert isinstance(resolve(config, "model.layers.10.mlp.up_proj"), Unquantized)
    assert in_words(resolve(config, "lm_head", LayerKind.HEAD)).startswith("e2m1 group 16")
    left = resolve(config, "model.layers.2.mlp.up_proj")
    assert isinstance(left, Delegated)
    assert says(left.reason, "NVFP4_SVD")


def test_a_size_of_groups_for_all_is_that_of_nvfp4() -> None:
    """As vLLM's class reads it."""
    config = NVFP4 | {"quant_algo": "MIXED_PRECISION", "group_size": 16}
    for kind, expected in (("mxfp8", "e4m3 group 32"), ("blocks", "e4m3 block 128")):
        for algorithm in ("MXFP8", "FP8_PB_WO"):
            config = config | {"quantized_layers": {Q: {"quant_algo": algorithm}}}
            found = in_words(Described.of(config, headers(kind)).resolve(Q))
            assert found.startswith(expected)


def test_mixed_precision_whose_layers_are_in_the_separate_file(tmp_path: Path) -> None:
    config = NVFP4 | {"quant_algo": "MIXED_PRECISION"}
    # Without a list, tensors tell.
    found = Described.of(config, headers("fp8", inputs=True)).resolve(Q)
    assert in_words(found) == f"e4m3 tensor -1{STATIC}"
    layers = {Q: {"quant_algo": "W4A16_NVFP4"}}
    inner = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": inner}))
    read = parse_in(tmp_path, config)
    assert in_words(read.resolve(Q, LayerKind.LINEAR, FileView())) == "e2m1 group 16"
    (tmp_path / "hf_quant_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=saying("hf_quant_config.json", "list", "map")):
        parse_in(tmp_path, config)


@pytest.mark.parametrize(
    "config",
    [
        NVFP4 | {"quant_algo": "NVFP4_SVD"},
        NVFP4 | {"quant_algo": "SomethingNew"},
        NVFP4 | {"quant_algo": None},
        NVFP4
        | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {Q: {"quant_algo": "NVFP4_SVD"}}},
    ],
)
def test_unknown_algorithms_are_left_to_vllm(config: dict[str, Any]) -> None:
    assert format_of(config) is None
    assert "quant_algo" in str(ModelOpt.unsupported(config))


def test_tensors_of_no_known_algorithm_are_left_to_vllm() -> None:
    config = NVFP4 | {"quant_algo": "MIXED_PRECISION"}
    one = TensorHeader("int32", (4, 4), 64, "model.safetensors")
    found = Described.of(config, Headers({f"{Q}.weight": one})).resolve(Q)
    assert isinstance(found, Delegated)


def test_a_file_without_any_scale_of_x_is_for_weights_only_and_the_plan_says_so() -> None:
    found = Described.of(NVFP4, headers("nvfp4")).resolve(Q)
    assert isinstance(found, CheckpointScheme)
    assert found.activation is None
    assert says(found.note, "no input_scale")


def test_scales_that_nothing_needs_are_taken_and_not_used() -> None:
    config = NVFP4 | {"quant_algo": "W4A16_NVFP4"}
    found = Described.of(config, headers("nvfp4", inputs=True)).resolve(Q)
    assert isinstance(found, CheckpointScheme)
    assert found.activation is None
    assert [t.name for t in found.tensors if t.role is Role.IGNORED] == ["input_scale"]


def test_group_sizes_that_the_configuration_does_not_give(tmp_path: Path) -> None:
    config = NVFP4 | {"quant_algo": "W4A16_AWQ"}
    described = Described.of(config, headers("int4"))
    assert in_words(described.resolve(Q)) == "uint4b8 group 128"
    described = Described.of(config | {"group_size": 64})
    assert in_words(described.resolve(Q)) == "uint4b8 group 64"
    # A size that is given is not bent to scales that do not fit.
    described = Described.of(config | {"group_size": 64}, headers("int4"))
    assert in_words(described.resolve(Q)) == "uint4b8 group 64"
    inner = {"quant_algo": "W4A16_AWQ", "group_size": 32}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": inner}))
    read = parse_in(tmp_path, config)
    assert in_words(read.resolve(Q, LayerKind.LINEAR, FileView())) == "uint4b8 group 32"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, True),
        ({"kv_cache_quant_algo": "FP8"}, True),
        ({"kv_cache_scheme": "FP8"}, True),
        ({"kv_cache_scheme": None, "kv_cache_quant_algo": None}, False),
        ({}, False),
    ],
)
def test_a_quantized_cache_is_vllms(config: dict[str, Any], expected: bool) -> None:
    found = parse(NVFP4 | config)
    assert found.has_attention_scales(FileView()) is expected
    name, own = found.delegated()
    assert name == "modelopt_fp4"
    assert bool(own["kv_cache_scheme"]) is expected


def test_vllms_own_configurations_are_complete() -> None:
    for algorithm, name in (
        ("FP8", "modelopt"),
        ("MXFP8", "modelopt_mxfp8"),
        ("W4A16_AWQ", None),
    ):
        found = parse({"quantization": {"quant_algo": algorithm, "exclude_modules": ["a*"]}})
        own, config = found.delegated()
        assert own == name
        assert config["ignore"] == ["a*"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"group_size": "many"}, ("group_size", "'many'", "int")),
        ({"ignore": 5}, ("ignore", 5)),
        ({"quantized_layers": ["a"]}, ("quantized_layers", "map")),
        ({"quantized_layers": {"a": "FP8"}}, ("quantized_layers", "map")),
        ({"config_groups": 3}, ("config_groups", "map")),
    ],
)
def test_wrong_values_are_errors(change: dict[str, Any], complaint: tuple[object, ...]) -> None:
    with pytest.raises(ConfigError, match=saying(*complaint)):
        parse(NVFP4 | change)


@pytest.mark.parametrize(("spec", "largest"), [(MXFP8_INPUT, 448.0), (MXFP4_INPUT, 6.0)])
def test_scales_that_are_powers_of_two_are_the_least_under_which_x_fits(
    spec: ActivationSpec, largest: float
) -> None:
    """Also for the float32 next to the largest value, where a smaller scale would saturate, which
    small values show: half of the least one is a tie to 0."""
    least = spec.element.table()
    least = float(least[least > 0].min())
    for top, doubled in ((largest, False), (float(np.nextafter(np.float32(largest), 1e3)), True)):
        x = torch.zeros(1, 32)
        x[0, 0], x[0, 1] = top, least
        found = quantize_dequantize(x, spec)
        assert found[0].tolist()[:2] == [largest, 0.0 if doubled else least]
