# SPDX-License-Identifier: Apache-2.0
"""What a view of a checkpoint's files says, built by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.gptq import gptq_scheme
from vllm.compressed_linear.formats.resolution import ConfigError, Unquantized

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


def test_views_are_values() -> None:
    file = view(f"{Q}.qweight")
    other = replace(file, marker_tensors=("weight_packed",))
    assert file.quantized_on_disk(Q)
    assert not other.quantized_on_disk(Q)
