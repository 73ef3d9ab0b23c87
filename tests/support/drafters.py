# SPDX-License-Identifier: Apache-2.0
"""A target whose continuations are known, and drafters that foresee them with their own head only.

The target is a clock: token t is followed by ``after(t)``, whatever came before. Its layers add
nothing to the residual stream, which is the token's row of the table, and its head reads that row.
An Eagle3 drafter sees the row of the token *before* the newest one, so its head has to tell the
token after the next: with the target's head, every draft is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from torch import nn

from tests.support.model_loading import LoadedModel, loaded, plain_attention
from tests.support.synthetic import Model, Quant, random_weight
from tests.support.table_models import Bits, TableModel, compress, write
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN

HIDDEN, VOCABULARY, HOUR = 128, 512, 8
"""Tokens of one hour follow each other in a circle."""
Meanings = dict[str, torch.Tensor]
FOUR_BITS, EIGHT_BITS = Bits(4, 32), Bits(8)


def after(tokens: torch.Tensor, steps: int = 1) -> torch.Tensor:
    """The tokens that follow, ``steps`` later."""
    return tokens // HOUR * HOUR + (tokens + steps) % HOUR


def rows_of_tokens() -> torch.Tensor:
    """[VOCABULARY, HIDDEN] of ±1: nearly orthogonal, and their own RMS norm."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 2, (VOCABULARY, HIDDEN), generator=generator).float() * 2 - 1


def head_telling(steps: int, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Head [tokens, HIDDEN] that tells the token ``steps`` after the one whose row it is given;
    ``tokens``: those of a reduced vocabulary."""
    known = torch.arange(VOCABULARY) if tokens is None else tokens
    return rows_of_tokens()[after(known, -steps)]


def set_clock(network: Any) -> None:
    """Turn transformers' Llama into a clock; layers that cannot be told from others stay random."""
    for name, parameter in network.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    network.get_input_embeddings().weight.copy_(rows_of_tokens())
    if network.get_output_embeddings() is not network.get_input_embeddings():
        network.get_output_embeddings().weight.copy_(head_telling(1))


def write_clock(path: Path, model: TableModel) -> None:
    """Write a target; ``model.family`` is Llama's."""
    write(model, path, set_clock)


@dataclass(frozen=True)
class Eagle3:
    """An Eagle3 drafter of the clock. None leaves linears, head or table unquantized. ``own_head``,
    ``own_table``: whether its file has them. ``tells``: how far its head sees. ``tokens``: its
    reduced vocabulary.

    ``layer``: name of its layer on disk. ``targets``: what the configuration selects its linears
    by. ``gptq``: how the linears are quantized, with random codes, instead of ``linear``;
    ``dynamic``: its rules, and the Quant for linears of other bits.
    """

    linear: Bits | None = FOUR_BITS
    head: Bits | None = EIGHT_BITS
    own_head: bool = True
    own_table: bool = False
    table: Bits | None = None
    tells: int = 2
    tokens: torch.Tensor | None = None
    layer: str = "midlayer"
    targets: tuple[str, ...] = ("Linear",)
    gptq: Quant | None = None
    dynamic: tuple[tuple[str, Quant], ...] = ()
    dtype: torch.dtype = torch.float32

    @property
    def draft_vocabulary(self) -> int:
        return VOCABULARY if self.tokens is None else len(self.tokens)


class _Scale(nn.Module):
    """A norm's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))


def _layer(k: int) -> nn.Module:
    """A layer of Llama that adds nothing; its attention is given ``k`` channels."""
    layer = nn.Module()
    layer.self_attn, layer.mlp = nn.Module(), nn.Module()
    for name, channels, n in (("q", k, 128), ("k", k, 64), ("v", k, 64), ("o", 128, 128)):
        setattr(layer.self_attn, f"{name}_proj", nn.Linear(channels, n, bias=False))
    for name, channels, n in (("gate", 128, 256), ("up", 128, 256), ("down", 256, 128)):
        setattr(layer.mlp, f"{name}_proj", nn.Linear(channels, n, bias=False))
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        setattr(layer, name, _Scale())
    return layer


def _network(drafter: Eagle3) -> nn.Module:
    torch.manual_seed(3)
    network = nn.Module()
    if drafter.layer == "midlayer":
        network.midlayer = _layer(2 * HIDDEN)
    else:
        network.layers = nn.ModuleList([_layer(2 * HIDDEN)])
    network.fc = nn.Linear(HIDDEN, HIDDEN, bias=False)
    network.fc.weight.data.copy_(torch.eye(HIDDEN))
    network.norm = _Scale()
    if drafter.own_head:
        network.lm_head = nn.Linear(HIDDEN, drafter.draft_vocabulary, bias=False)
        network.lm_head.weight.data.copy_(head_telling(drafter.tells, drafter.tokens))
    if drafter.own_table:
        network.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        network.embed_tokens.weight.data.copy_(rows_of_tokens())
    return network.to(drafter.dtype)


def _quantization(drafter: Eagle3) -> QuantizationConfig | None:
    groups = {}
    if drafter.linear is not None and drafter.gptq is None:
        groups["group_0"] = drafter.linear.scheme("")
        groups["group_0"].targets = list(drafter.targets)
    if drafter.head is not None and drafter.own_head:
        groups["group_1"] = drafter.head.scheme("re:.*lm_head")
    if drafter.table is not None:
        groups["group_2"] = drafter.table.scheme("Embedding")
    if not groups or drafter.gptq is not None:
        return None
    return QuantizationConfig(
        config_groups=groups,
        ignore=[] if drafter.head is not None else ["lm_head"],
        format="pack-quantized",
    )


def _gptq(drafter: Eagle3, network: nn.Module) -> tuple[dict[str, torch.Tensor], Meanings]:
    """Tensors of the quantized linears of ``network``, which are taken out of it."""
    assert drafter.gptq is not None
    generator = torch.Generator().manual_seed(4)
    tensors, meanings = {}, {}
    for name, linear in list(network.named_modules()):
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        others = (q for part, q in drafter.dynamic if re.fullmatch(part, name))
        n, k = linear.weight.shape
        order = torch.randperm(k, generator=generator) if drafter.gptq.act_order else None
        stored, meanings[name] = random_weight(next(others, drafter.gptq), n, k, generator, order)
        tensors |= {f"{name}.{key}": tensor for key, tensor in stored.items()}
        del linear.weight
    return tensors, meanings


def write_eagle3(path: Path, drafter: Eagle3) -> Meanings:
    """Write the drafter under the names of published ones, with the compressed-tensors library
    unless it is GPTQ. Returns what its linears mean, by their names on disk."""
    network = _network(drafter)
    quantization, compressor = _quantization(drafter), None
    tensors: dict[str, torch.Tensor] = {}
    meanings: Meanings = {}
    if drafter.gptq is not None:
        tensors, meanings = _gptq(drafter, network)
    elif quantization is not None:
        compressor = compress(network, quantization)
    tensors |= {k: v.detach().contiguous().clone() for k, v in network.state_dict().items()}
    if drafter.tokens is not None:
        tensors["d2t"] = drafter.tokens - torch.arange(len(drafter.tokens))
        tensors["t2d"] = torch.isin(torch.arange(VOCABULARY), drafter.tokens)
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = TableModel("llama", tied=False).hf_config()
    config.update(
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "num_hidden_layers": 1,
            "draft_vocab_size": drafter.draft_vocabulary,
            "eagle_aux_hidden_state_layer_ids": [1],
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1]},
            "dtype": drafter.dtype,
        }
    )
    if drafter.gptq is not None:
        rules = {rf"+:^{part}$": {"bits": q.bits} for part, q in drafter.dynamic}
        found = Model(drafter.gptq).quantization_config() | {"dynamic": rules}
        config.update({"quantization_config": found})
    config.save_pretrained(path)
    if compressor is not None:
        compressor.update_config(str(path))
        compressor.decompress_model(network)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name not in meanings:
            meanings[name] = module.weight.detach().float()
    return meanings


@contextmanager
def loaded_with_drafter(
    target: Path, drafter: dict[str, Any], dtype: str = "float32", **options: Any
) -> Iterator[tuple[LoadedModel, Any]]:
    """A target, and vLLM's proposer with the drafter that it loads for the target; ``drafter`` is
    vLLM's ``speculative_config``."""
    from vllm.v1.spec_decode.draft_model import DraftModelProposer
    from vllm.v1.spec_decode.eagle import EagleProposer

    options = {"skip_tokenizer_init": True, "speculative_config": drafter} | options
    with loaded(target, dtype, **options) as model:
        own = model.config.speculative_config
        kind = DraftModelProposer if own.uses_draft_model() else EagleProposer
        proposer = kind(model.config, torch.device("cpu"))
        proposer.load_model(model.model)
        for plan in PROCESS_PLAN.drafters.values():
            assert not plan.is_open, "vLLM did not process the drafter"
            assert plan.prepared == plan.expected
        yield model, proposer


@torch.inference_mode()
def drafts(model: LoadedModel, proposer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What a drafter of the clock expects to follow, given the hidden states of ``tokens`` and the
    tokens after them."""
    from vllm.forward_context import set_forward_context

    draft = proposer.model
    with set_forward_context(None, model.config), plain_attention(draft):
        hidden, positions = rows_of_tokens()[tokens], torch.ones_like(tokens)
        if hasattr(draft, "combine_hidden_states"):
            hidden, _ = draft(after(tokens), positions, draft.combine_hidden_states(hidden))
        else:
            hidden = draft(after(tokens), positions, hidden)
        return draft.compute_logits(hidden).argmax(-1)


def write_clock_with_mtp(path: Path, model: TableModel) -> None:
    """Write a target with a layer for multi-token prediction in the same file, as MiMo has it. The
    layer sees the newest token's row, so with the target's head it tells the next token."""

    def set_weights(network: Any) -> None:
        set_clock(network)
        layer = _layer(HIDDEN)
        for name in ("q", "k", "v"):
            projection = getattr(layer.self_attn, f"{name}_proj")
            projection.bias = nn.Parameter(torch.zeros(projection.out_features))
        del layer.hidden_norm
        for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            setattr(layer, name, _Scale())
        layer.input_proj = _Scale()  # vLLM does not build it for quantized weights
        newest = torch.cat([torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)], 1)
        layer.input_proj.weight = nn.Parameter(newest)
        network.model.mtp_layers = nn.ModuleList([layer])

    write(model, path, set_weights)
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
