# SPDX-License-Identifier: Apache-2.0
"""Which modules a configuration of compressed-tensors quantizes, and how: the rules of that
library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.described import Described
from tests.support.format_configs import (
    INT4,
    INT8,
    Q,
    as_a_part,
    bits_and_group,
    groups,
    resolve,
)
from tests.support.messages import saying
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.compressed_tensors import CompressedTensors
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.registry import format_of, parse
from vllm.compressed_linear.formats.resolution import (
    ConfigError,
    LayerKind,
    Resolution,
    Unquantized,
)
from vllm.compressed_linear.spec.descriptor import ActivationSpec
from vllm.compressed_linear.spec.elements import INT8 as INT8_CODES
from vllm.compressed_linear.spec.scheme import CheckpointScheme


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        ((["Linear"], [Q]), []),
        (([Q], ["Linear"]), []),
        ((["re:.*q_proj"], ["Linear"]), []),
        ((["Linear"], ["re:.*q_proj"]), []),
        (([Q], ["re:.*q_proj"]), []),
        ((["re:.*q_proj"], [r"re:.*self_attn\..*"]), []),
        ((["re:.*_proj"], ["re:.*q_proj"]), []),
        ((["Linear"], ["Linear"]), []),  # the last group with a target
        ((["re:.*q_proj"], ["re:.*k_proj"]), ["re:.*q_proj"]),
        ((["Linear"], ["re:.*k_proj"]), [Q]),
        ((["Linear"], ["re:.*k_proj"]), ["Linear"]),
        ((["Linear"], ["re:.*k_proj"]), ["q_proj"]),  # no whole name: excludes nothing
        ((["q_proj"], ["re:q_proj"]), []),  # neither matches
        ((["re:model.*q_"], []), ["re:.*mlp"]),
    ],
)
def test_targets_match_as_the_library_has_it(
    targets: tuple[list[str], list[str]], ignore: list[str]
) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = groups((targets[0], INT4), (targets[1], INT8), ignore=ignore)
    model = torch.nn.Module()
    at = model
    for part in Q.split(".")[:-1]:
        at.add_module(part, torch.nn.Module())
        at = at.get_submodule(part)
    at.add_module("q_proj", torch.nn.Linear(256, 32))
    library = QuantizationConfig.model_validate({**config, "quantization_status": "initialized"})
    apply_quantization_config(model, library)
    scheme = getattr(model.get_submodule(Q), "quantization_scheme", None)
    expected = None if scheme is None else scheme.weights.num_bits

    found = bits_and_group(resolve(config))
    assert (None if found is None else found[0]) == expected


def test_lm_head_is_a_linear_layer_and_embeddings_are_another_class() -> None:
    config = groups((["Linear"], INT4))
    assert bits_and_group(resolve(config, "lm_head", LayerKind.HEAD)) == (4, 128)
    assert bits_and_group(resolve(config, "model.embed_tokens", LayerKind.EMBEDDING)) is None
    ignored = groups((["Linear"], INT4), ignore=["lm_head"])
    assert bits_and_group(resolve(ignored, "lm_head", LayerKind.HEAD)) is None


def test_sparse_weights_are_refused_where_the_file_does_not_have_their_codes() -> None:
    sparse = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    config = groups((["Linear"], INT4), sparsity_config=sparse)
    assert format_of(config) is CompressedTensors
    with pytest.raises(ConfigError, match=saying(Q, "sparsity_config.format", "sparse-24-bitmask")):
        resolve(config)
    assert bits_and_group(Described.of(config, headers_of_packed(4)).resolve(Q)) == (4, 128)
    for harmless in ({}, {"format": "dense", "ignore": ["lm_head"]}):
        config = groups((["Linear"], INT4), sparsity_config=harmless)
        assert bits_and_group(resolve(config)) == (4, 128)


@pytest.mark.needs_vllm
@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        ("Linear", {LayerKind.LINEAR, LayerKind.HEAD}),
        ("linear", {LayerKind.LINEAR, LayerKind.HEAD}),
        ("Embedding", {LayerKind.EMBEDDING}),
        ("ParallelLMHead", {LayerKind.HEAD}),
        ("LMHead", {LayerKind.HEAD}),
        ("VocabParallelEmbedding", {LayerKind.EMBEDDING}),
        ("LlamaAttention", set()),
    ],
)
def test_targets_may_be_parts_of_vllms_classes(target: str, kinds: set[LayerKind]) -> None:
    """Where vLLM and the library differ (a head is a linear layer there), both select."""
    from vllm.model_executor.layers.linear import QKVParallelLinear
    from vllm.model_executor.layers.quantization.utils.config_utils import is_equal_or_regex_match
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    classes = {
        LayerKind.LINEAR: QKVParallelLinear,
        LayerKind.HEAD: ParallelLMHead,
        LayerKind.EMBEDDING: VocabParallelEmbedding,
    }
    found = Described.of(groups(([target], INT4)))
    for kind, layer in classes.items():
        selected = isinstance(found.resolve("a.b", kind), CheckpointScheme)
        assert selected == (kind in kinds)
        assert selected >= is_equal_or_regex_match(layer.__name__, target, check_contains=True)
    asked: dict[str, LayerKind | None] = {f"a.{kind}": kind for kind in kinds}
    assert found.format.unmatched_entries(found.file, asked) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_bits": None}, ("weights", "num_bits")),
        ({"num_bits": 12}, (12, "bits")),
        ({"group_size": "x"}, ("group_size", "'x'")),
        ({"group_size": 0}, ("group_size", 0)),
    ],
)
def test_compressed_tensors_that_say_nothing_possible(
    change: dict[str, Any], complaint: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigError, match=saying(*complaint)):
        parse(groups((["Linear"], {**INT4, **change})))


@pytest.mark.needs_vllm
@pytest.mark.parametrize(
    "targets",
    [
        (["re:.*q_proj"], [Q]),
        ([Q], ["re:.*q_proj"]),
        (["re:.*q_proj"], [r"re:.*self_attn\..*"]),
        ([r"re:.*self_attn\..*"], ["re:.*q_proj"]),
        (["Linear"], ["re:.*q_proj"]),
        (["Linear", "re:.*k_proj"], [r"re:.*self_attn\..*", Q]),
    ],
)
def test_of_several_targets_the_first_decides_as_in_vllm(
    targets: tuple[list[str], list[str]],
) -> None:
    """The library takes names first, and expressions in the order of their text."""
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
        find_matched_target,
    )

    config = groups((targets[0], INT4), (targets[1], INT8))
    chosen = find_matched_target(Q, torch.nn.Linear(1, 1), [*targets[0], *targets[1]])
    assert bits_of(resolve(config)) == (4 if chosen in targets[0] else 8)


# Names that vLLM has for layers which it fuses.

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "fused_wqa_wkv": ["wq_a", "wkv"]}
FUSED = Q.replace("q_proj", "qkv_proj")


@pytest.mark.parametrize("entry", ["re:.*qkv_proj$", FUSED, r"re:.*layers\.1\..*qkv"])
def test_targets_and_exclusions_in_names_of_fused_layers(entry: str) -> None:
    targeted = parse(groups(([entry], INT8), (["Linear"], INT4)))
    ignored = parse(groups((["Linear"], INT4), ignore=[entry]))
    for file in (FileView(packed=PACKED), FileView(headers_of_packed(8), packed=PACKED)):
        for last in ("q_proj", "k_proj", "v_proj"):
            member = Q.replace("q_proj", last)
            assert bits_of(targeted.resolve(member, LayerKind.LINEAR, file)) == 8
            if file.headers is None:
                found = ignored.resolve(member, LayerKind.LINEAR, file)
                assert found == Unquantized(f"ignore: {entry}")
        other = Q.replace("q_proj", "o_proj")
        assert bits_of(targeted.resolve(other, LayerKind.LINEAR, FileView(packed=PACKED))) == 4
    asked: dict[str, LayerKind | None] = {Q: LayerKind.LINEAR}
    assert ignored.unmatched_entries(FileView(packed=PACKED), asked) == []


def test_fused_names_of_any_model() -> None:
    found = parse(groups((["re:.*fused_wqa_wkv"], INT8), (["Linear"], INT4)))
    file = FileView(packed=PACKED)
    assert bits_of(found.resolve("model.layers.0.attn.wkv", LayerKind.LINEAR, file)) == 8
    assert bits_of(found.resolve("model.layers.0.attn.wo", LayerKind.LINEAR, file)) == 4


def bits_of(resolution: Resolution) -> int:
    assert isinstance(resolution, CheckpointScheme)
    return resolution.weight.element.bits


def headers_of_packed(
    bits: int, group: int = 128, *, n: int = 64, k: int = 256, zero: bool = False
) -> Headers:
    """q, k and v of one layer, packed."""
    found = {}
    for last in ("q_proj", "k_proj", "v_proj"):
        module = Q.replace("q_proj", last)
        scales = (n, 1 if group == -1 else k // group)
        found[f"{module}.weight_packed"] = TensorHeader("int32", (n, k * bits // 32), 0, "a")
        found[f"{module}.weight_scale"] = TensorHeader("bfloat16", scales, 0, "a")
        found[f"{module}.weight_shape"] = TensorHeader("int64", (2,), 0, "a")
        if zero:
            points = (n * bits // 32, scales[1])
            found[f"{module}.weight_zero_point"] = TensorHeader("int32", points, 0, "a")
    return Headers(found)


INT4_64 = {**INT4, "group_size": 64}
ASYMMETRIC = {**INT4, "symmetric": False}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((["re:.*_proj"], INT4), (["re:.*q_proj"], {**INT4, "num_bits": 8})),
        ((["re:.*_proj"], INT4), (["re:.*q_proj"], INT4_64)),
        ((["re:.*q_proj"], ASYMMETRIC), (["re:.*_proj"], INT4)),
        ((["Linear"], INT4), (["Linear"], {**INT4, "num_bits": 8})),
        ((["Linear"], INT4), ([Q], {**INT4, "num_bits": 8})),
    ],
)
def test_the_file_settles_which_of_several_groups_a_module_has(
    first: tuple[list[str], dict[str, Any]], second: tuple[list[str], dict[str, Any]]
) -> None:
    """Whatever the order of the groups; the library and vLLM have different ones."""
    for weights in (first[1], second[1]):
        zero = weights.get("symmetric") is False
        headers = headers_of_packed(weights["num_bits"], weights["group_size"], zero=zero)
        for order in ((first, second), (second, first)):
            found = Described.of(groups(*order), headers).resolve(Q)
            assert bits_and_group(found) == (weights["num_bits"], weights["group_size"])
            assert isinstance(found, CheckpointScheme)
            assert (found.weight.zero is not None) == zero


def test_two_formats_with_one_target_are_told_by_the_container() -> None:
    """As in published mixtures of fp8 attention and 4-bit experts."""
    blocks = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    config = groups((["Linear"], blocks), (["Linear", "re:.*w1$"], INT4), format="mixed-precision")
    for group, form in (("group_0", "float-quantized"), ("group_1", "pack-quantized")):
        config["config_groups"][group]["format"] = form
    fp8 = Headers(
        {
            f"{Q}.weight": TensorHeader("float8_e4m3fn", (64, 256), 0, "a"),
            f"{Q}.weight_scale": TensorHeader("float32", (1, 2), 0, "a"),
        }
    )
    found = Described.of(config, fp8).resolve(Q)
    assert isinstance(found, CheckpointScheme)
    assert found.weight.element.name == "e4m3"
    assert bits_and_group(Described.of(config, headers_of_packed(4)).resolve(Q)) == (4, 128)


def test_where_shapes_fit_two_groups_the_stated_shape_settles_it(tmp_path: Path) -> None:
    """Per channel, 4 bits of 256 channels and 8 bits of 128 are as wide."""
    channel = {"strategy": "channel", "group_size": None}
    config = groups((["re:.*_proj"], {**INT4, **channel}), (["re:.*q_proj"], {**INT8}))
    for bits, k in ((4, 256), (8, 128)):
        tensors = {
            f"{Q}.weight_packed": torch.zeros(64, 32, dtype=torch.int32),
            f"{Q}.weight_scale": torch.ones(64, 1),
            f"{Q}.weight_shape": torch.tensor([64, k]),
        }
        save_file(tensors, tmp_path / "model.safetensors")
        assert bits_and_group(Described.of(config).with_file(tmp_path).resolve(Q)) == (bits, -1)
        renamed = Described.of(config).with_file(tmp_path).renamed(as_a_part)
        assert bits_and_group(renamed.resolve(as_a_part(Q))) == (bits, -1)


def test_a_target_that_is_another_class_counts_where_the_file_has_codes() -> None:
    config = Described.of(groups((["ClippableLinear"], INT4)), headers_of_packed(4))
    assert bits_and_group(config.resolve(Q)) == (4, 128)
    assert isinstance(resolve(groups((["ClippableLinear"], INT4))), Unquantized)


def test_a_head_inside_of_a_larger_model_without_headers() -> None:
    """As pytorch_model.bin, of which no headers are known; vLLM's mapper needs the dot."""
    config = Described.of(groups((["Linear"], INT4), ignore=["lm_head", "re:^visual"]))

    def rename(name: str) -> str:
        return f"language_model.{name}" if name.startswith(("model.", "lm_head.")) else name

    for found in (config, config.renamed(rename), config.renamed(as_a_part)):
        resolution = found.resolve("language_model.lm_head", LayerKind.HEAD)
        assert resolution == Unquantized("ignore: lm_head")
        assert bits_and_group(found.resolve(f"language_model.{Q}")) == (4, 128)


# Outputs that are quantized.


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_dynamic_outputs_are_refused_by_name(form: str) -> None:
    config = groups((["Linear"], INT4), format=form)
    output = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    config["config_groups"]["group_0"]["output_activations"] = output
    assert format_of(config) is CompressedTensors
    complaint = saying(Q, "group_0.output_activations", "dynamic per token", "null")
    with pytest.raises(ConfigError, match=complaint):
        resolve(config)
    # What is excluded has no outputs to quantize.
    assert resolve({**config, "ignore": [Q]}) == Unquantized(f"ignore: {Q}")


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_outputs(inputs: bool, symmetric: bool) -> None:
    config = groups((["Linear"], INT4))
    static = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    group = config["config_groups"]["group_0"]
    group["output_activations"] = {**static, "symmetric": symmetric}
    group["input_activations"] = static if inputs else None
    found = resolve(config)
    assert isinstance(found, CheckpointScheme)
    assert found.output_activation == ActivationSpec(INT8_CODES, False, "tensor", symmetric)
    assert (found.activation is not None) == inputs
    names = {tensor.name for tensor in found.tensors}
    assert ("output_zero_point" in names) == (not symmetric)
    assert {"output_scale"} | ({"input_scale"} if inputs else set()) <= names
    table = groups((["Embedding"], INT4))
    table["config_groups"]["group_0"] |= {"input_activations": static, "output_activations": static}
    looked_up = resolve(table, "model.embed_tokens", LayerKind.EMBEDDING)
    assert isinstance(looked_up, CheckpointScheme)
    assert (looked_up.activation, looked_up.output_activation) == (None, None)


@pytest.mark.parametrize("side", ["input", "output"])
def test_quantized_activations_of_plain_weights_are_refused_by_name(side: str) -> None:
    config = groups((["Linear"], INT4))
    static = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    config["config_groups"]["group_0"] |= {"weights": None, f"{side}_activations": static}
    with pytest.raises(ConfigError, match=saying(Q, f"group_0.{side}_activations", "null")):
        resolve(config)
    # Of attention they are scales of the cache, which vLLM reads elsewhere.
    config["config_groups"]["group_0"]["targets"] = ["LlamaAttention"]
    assert isinstance(resolve(config), Unquantized)
