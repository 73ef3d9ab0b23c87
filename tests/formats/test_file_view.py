# SPDX-License-Identifier: Apache-2.0
"""What a view of a checkpoint's files says, built by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support.described import Described
from tests.support.format_configs import (
    AUTO_ROUND,
    GPTQ,
    INT4,
    INT8,
    bits_and_group,
    groups,
)
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.compressed_tensors_targets import Targets
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.formats.resolution import ConfigError, LayerKind, Unquantized

Q = "model.layers.1.self_attn.q_proj"
NOT_KNOWN = FileView()


def view(*names: str, dtype: str = "bfloat16") -> FileView:
    """A file of GPTQ with one tensor of each name."""
    headers = Headers(dict.fromkeys(names, TensorHeader(dtype, (1,), 2, "a.safetensors")))
    return FileView(headers, ("qweight",))


def test_without_a_file_nothing_is_known() -> None:
    assert NOT_KNOWN.names_of(Q) == (Q,)
    assert NOT_KNOWN.tensors_on_disk(Q) is None
    assert not NOT_KNOWN.quantized_on_disk(Q)
    assert NOT_KNOWN.unquantized_on_disk(Q) is None
    assert NOT_KNOWN.experts_quantized("model.layers.0.mlp") is None
    assert NOT_KNOWN.only_table() == ""
    assert NOT_KNOWN.may_have("lm_head")
    assert NOT_KNOWN.renamed(str.upper) == NOT_KNOWN
    NOT_KNOWN.check_against_file(Q, Q, Unquantized("a rule"))
    NOT_KNOWN.check_against_file(Q, Q, gptq_scheme(4, 128, version="gptq"))


def test_codes_tell_a_quantized_module() -> None:
    file = view(f"{Q}.qweight", f"{Q}.scales")
    assert file.tensors_on_disk(Q) == {"qweight", "scales"}
    assert file.quantized_on_disk(Q)
    assert file.unquantized_on_disk(Q) is None


def test_a_float_weight_tells_an_unquantized_module() -> None:
    file = view(f"{Q}.weight")
    assert file.unquantized_on_disk(Q) == Unquantized(f"the checkpoint holds a plain {Q}.weight")
    assert view(f"{Q}.weight", dtype="int8").unquantized_on_disk(Q) is None
    assert view(f"{Q}.weight", f"{Q}.qweight").unquantized_on_disk(Q) is None


def test_the_same_name_under_other_parents_tells_where_the_module_is_not_in_the_file() -> None:
    plain, codes = "transformer.h.1.attn.q_proj.weight", "transformer.h.1.attn.q_proj.qweight"
    expected = Unquantized("no q_proj of the checkpoint is quantized")
    assert view(plain).unquantized_on_disk(Q) == expected
    assert view(codes).unquantized_on_disk(Q) is None
    assert view("transformer.h.1.attn.k_proj.weight").unquantized_on_disk(Q) is None


def test_renaming_keeps_the_checkpoints_own_name() -> None:
    file = view(f"{Q}.qweight", "lm_head.weight")
    renamed = file.renamed(lambda name: name.replace("model.", "language_model.", 1))
    renamed = renamed.renamed(lambda name: name.replace("language_model.", "a.model.", 1))
    assert renamed.names_of(f"a.{Q}") == (f"a.{Q}", Q)
    assert renamed.names_of("lm_head") == ("lm_head",)
    assert renamed.quantized_on_disk(f"a.{Q}")
    assert not renamed.quantized_on_disk(Q)
    assert file == view(f"{Q}.qweight", "lm_head.weight")


def test_a_name_that_is_dropped_stays_as_it_was() -> None:
    assert list(view("a.weight", "b.weight").renamed(lambda name: None).modules) == ["a", "b"]


def test_codes_of_a_module_that_a_rule_leaves_alone_are_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=rf"qkv: .*{Q}.*\(a rule\).*a\.safetensors.*{Q}\.qweight"):
        view(f"{Q}.qweight").check_against_file("qkv", Q, Unquantized("a rule"))
    view(f"{Q}.weight").check_against_file("qkv", Q, Unquantized("a rule"))


def test_a_missing_tensor_of_a_scheme_is_named() -> None:
    scheme = gptq_scheme(4, 128, version="gptq")
    with pytest.raises(ConfigError, match=rf"qkv: .*{Q}\.scales.*holds qweight, qzeros"):
        view(f"{Q}.qweight", f"{Q}.qzeros").check_against_file("qkv", Q, scheme)
    # A group index may be missing.
    view(f"{Q}.qweight", f"{Q}.qzeros", f"{Q}.scales").check_against_file("qkv", Q, scheme)


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (["model.embed_tokens.weight", f"{Q}.qweight"], "model.embed_tokens"),
        (["wte.weight", "wpe.weight"], "wte"),
        (["embed_tokens.weight", "embed_positions.weight"], ""),
        (["embed_tokens.qweight", "embed_positions.weight"], "embed_tokens"),
        ([f"{Q}.qweight"], ""),
    ],
)
def test_the_only_embedding_table(names: list[str], table: str) -> None:
    assert view(*names).only_table() == table


def test_a_head_is_known_by_its_last_name() -> None:
    assert view("model.lm_head.weight").may_have("language_model.lm_head")
    assert not view("model.embed_tokens.weight").may_have("lm_head")


@pytest.mark.parametrize(
    ("names", "quantized"),
    [
        (["a.mlp.experts.0.up_proj.qweight"], True),
        (["a.mlp.experts.0.up_proj.qweight", "a.mlp.experts.1.up_proj.weight"], True),
        (["a.mlp.experts.0.up_proj.weight", "a.mlp.gate.qweight"], False),
        # Fused next to the layer: only a parent without any codes is an answer.
        (["a.mlp.experts_up.weight", "a.mlp.gate.weight"], False),
        (["a.mlp.experts_up.weight", "a.mlp.gate.qweight"], None),
        (["b.mlp.experts.0.up_proj.qweight"], None),
    ],
)
def test_experts_are_known_by_what_is_below_the_layer(
    names: list[str], quantized: bool | None
) -> None:
    assert view(*names).experts_quantized("a.mlp.experts") is quantized


@pytest.mark.parametrize(
    ("names", "quantized"),
    [
        (["a.3.moe.experts.0.w1.weight", "a.3.attn.k_proj.qweight"], False),
        (["a.3.moe.experts.0.w1.weight", "a.3.moe.experts.1.w1.qweight"], True),
        (["a.4.moe.experts.0.w1.weight"], None),
    ],
)
def test_experts_are_known_by_the_number_of_their_layer(
    names: list[str], quantized: bool | None
) -> None:
    """vLLM's class for MiniMax says mlp where the files say block_sparse_moe."""
    assert view(*names).experts_quantized("a.3.mlp.experts") is quantized


def test_views_are_values() -> None:
    file = view(f"{Q}.qweight")
    other = replace(file, marker_tensors=("weight_packed",))
    assert file.quantized_on_disk(Q)
    assert not other.quantized_on_disk(Q)


# Modules that vLLM calls otherwise than the file.


TARGET = (
    *("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"),
    *("model.layers.1.attn.k_proj", "model.layers.0.attn.v_proj"),
)


@pytest.mark.parametrize(
    ("modules", "asked", "stored"),
    [
        # vLLM's own names before those of a drafter.
        (TARGET, "draft_model.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        (TARGET, "draft_model.lm_head", "lm_head"),
        (("layers.0.q", "layers.1.q"), "model.layers.1.q", "layers.1.q"),
        # Eagle3 counts on from the target's layers; its only layer has no number, or 0.
        (("midlayer.mlp.q", "fc"), "model.layers.32.mlp.q", "midlayer.mlp.q"),
        (("layers.0.q", "layers.0.experts.3.k"), "model.layers.32.q", "layers.0.q"),
        (("layers.0.q", "layers.1.q"), "model.layers.32.q", ""),
        # Keys are values.
        (TARGET, "model.layers.1.attn.v_proj", "model.layers.1.attn.k_proj"),
        (TARGET, "draft_model.model.layers.1.attn.v_proj", "model.layers.1.attn.k_proj"),
        (("midlayer.k_proj",), "model.layers.32.v_proj", "midlayer.k_proj"),
        # Of these the file has nothing.
        (TARGET, "model.layers.2.attn.v_proj", ""),
        (TARGET, "model.layers.32.mlp.up_proj", ""),
        (TARGET, "head", ""),
    ],
)
def test_where_the_file_has_the_tensors_of_a_module(
    modules: tuple[str, ...], asked: str, stored: str
) -> None:
    file = view(*(f"{module}.qweight" for module in modules))
    assert file.stored_as(asked) == (stored or asked)
    assert file.names_of(asked) == tuple(dict.fromkeys((asked, stored or asked)))
    assert file.quantized_on_disk(asked) == bool(stored)
    assert (file.header(asked, "qweight") is not None) == bool(stored)


@pytest.mark.parametrize(
    "config",
    [
        {**GPTQ, "dynamic": {r"^midlayer\.": {"bits": 8}}},
        {**AUTO_ROUND, "extra_config": {"midlayer.q_proj": {"bits": 8}}},
        {**AUTO_ROUND, "bits": 8, "block_name_to_quantize": "midlayer"},
        groups(([r"re:^midlayer\..*"], INT8), (["Linear"], INT4)),
        groups((["midlayer.q_proj"], INT8), (["Linear"], INT4)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "draft_model."])
def test_entries_written_for_the_file_select_the_layer_of_a_drafter(
    config: dict[str, Any], prefix: str
) -> None:
    found = Described.of(config)
    marker = found.format.marker_tensors[0]
    found = found.with_file([f"midlayer.q_proj.{marker}", f"fc.{marker}"])
    asked = f"{prefix}model.layers.32.q_proj"
    resolution = bits_and_group(found.resolve(asked))
    assert resolution is not None
    assert resolution[0] == 8
    unmatched = dict(found.format.unmatched_entries(found.file, {asked: LayerKind.LINEAR}))
    assert unmatched == ({} if "config_groups" not in config else unmatched)


def test_values_that_are_keys_are_resolved_as_keys() -> None:
    """Groups by name have no entry for a projection that the quantized model did not have."""
    k = Q.replace("q_proj", "k_proj")
    config = Described.of(groups(([Q, k], INT8))).with_file(
        [f"{module}.{name}" for module in (Q, k) for name in ("weight_packed", "weight_scale")]
    )
    values = Q.replace("q_proj", "v_proj")
    assert config.resolve(values) == config.resolve(k)
    config.file.check_against_file("layer", values, config.resolve(values))


def test_names_in_which_vllm_fuses_a_module() -> None:
    file = replace(view(f"{Q}.qweight"), packed={"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    fused = Q.replace("q_proj", "qkv_proj")
    members = [Q.replace("q_proj", member) for member in ("q_proj", "k_proj", "v_proj")]
    assert file.names_of(Q) == (Q,)
    assert file.names_of(Q).fused == {fused: members}
    assert file.names_of(Q.replace("q_proj", "o_proj")).fused == {}


@pytest.mark.parametrize(
    ("entry", "selected"),
    [
        (r"re:.*qkv_proj$", {"q_proj", "k_proj", "v_proj"}),
        (r"re:.*v_proj$", {"v_proj"}),  # the end of qkv_proj, too
        (r"re:.*(q|k)_proj$", {"q_proj", "k_proj"}),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_an_entry_for_a_member_is_not_one_for_the_fused_layer(
    entry: str, selected: set[str], known: bool
) -> None:
    names = [Q.replace("q_proj", member) for member in ("q_proj", "k_proj", "v_proj")]
    file = view(*(f"{name}.weight_packed" for name in names)) if known else FileView()
    file = replace(file, packed={"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    ignore = Targets.of("ignore", [entry])
    found = {name.rpartition(".")[2] for name in names if ignore.first(file.names_of(name))}
    assert found == selected


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("decoder.layers.0.layers.fc1", "model.decoder.layers.0.fc1"),
        ("layers.0.layers.fc1", "layers.0.layers.fc1"),  # of the encoder or the decoder
        ("decoder.layers.1.layers.fc1", "decoder.layers.1.layers.fc1"),
        ("model.decoder.layers.0.fc1", "model.decoder.layers.0.fc1"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_list_that_a_model_names_twice_is_found(module: str, found: str) -> None:
    file = view("model.decoder.layers.0.fc1.qweight", "model.encoder.layers.0.fc1.qweight")
    assert file.stored_as(module) == found
