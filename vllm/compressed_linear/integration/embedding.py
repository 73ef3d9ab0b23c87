# SPDX-License-Identifier: Apache-2.0
"""Quantization methods for vLLM's embedding tables and unquantized output heads.

A table and the heads that are tied to it share one prepared copy, on the table's layer, for lookups
and for products. The natural weight of an unquantized table is freed unless vLLM reads it
(``compat.reader_of_tables``).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.formats.resolution import LayerKind
from vllm.compressed_linear.integration import compat
from vllm.compressed_linear.integration.linear import (
    CompressedLinearMethod,
    DenseMethod,
    layer_context,
)
from vllm.compressed_linear.integration.preparation import ModelPreparation
from vllm.compressed_linear.integration.stand_in import StandIn


class TiedHeads:
    """The output heads that are tied to the table called ``table``."""

    def __init__(self, table: str) -> None:
        self.table = table
        self.layers: list[Any] = []
        self.names: list[str] = []

    def add(self, layer: Any, name: str) -> None:
        self.layers.append(layer)
        self.names.append(name)

    def keep(self, layers: Set[torch.nn.Module]) -> None:
        """Forget heads that are not among ``layers``: pooling models drop theirs."""
        kept = [
            (layer, name)
            for layer, name in zip(self.layers, self.names, strict=True)
            if layer in layers
        ]
        self.layers, self.names = [layer for layer, _ in kept], [name for _, name in kept]

    @property
    def plan_name(self) -> str:
        """Name of the shared copy in the plan: that of the head, which dominates the time."""
        return self.names[0] if self.names else self.table

    def context(self, table: Any, dtype: torch.dtype) -> LayerContext:
        """Context of the table's layer, with the bias of a head."""
        return layer_context(self.layers[0] if self.layers else table, dtype)


class CompressedEmbeddingMethod(CompressedLinearMethod):
    """Embedding table that the checkpoint quantizes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heads = TiedHeads(self.prefix)

    def settle(self, layers: Set[torch.nn.Module]) -> None:
        self.heads.keep(layers)

    def context(self, layer: Any) -> LayerContext:
        return replace(self.heads.context(layer, self.params_dtype), lookup=True)

    @property
    def plan_name(self) -> str:
        return self.heads.plan_name

    @property
    def plan_kind(self) -> LayerKind:
        return LayerKind.HEAD if self.heads.names else LayerKind.EMBEDDING

    @property
    def plan_note(self) -> str:
        return f"tied: {self.prefix} looks up in it" if self.heads.names else ""

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] → rows [..., K]."""
        assert self.prepared is not None, f"{self.prefix}: weights were never processed"
        return self.prepared.embedding(layer, ids)


class TiedHeadMethod(QuantizeMethodBase):
    """Output head that is tied to a quantized embedding table and multiplies with its copy.

    Not a subclass of vLLM's unquantized method, so that vLLM does not look for a natural weight.
    """

    def __init__(self, table: Any) -> None:
        self.table = table

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a tied output head has no weights of its own")

    def process_weights_after_loading(self, layer: Any) -> None:
        table, method = self.table, self.table.quant_method
        shape, device = (0, table.embedding_dim), next(table.parameters()).device
        held = method.held_by(table)
        weight = StandIn(method.plan_name, shape, method.params_dtype, device, held)
        layer.register_parameter("weight", weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] → [..., N]."""
        return self.table.quant_method.apply(self.table, x, bias)


class CompressedUnquantizedEmbeddingMethod(DenseMethod, UnquantizedEmbeddingMethod):
    """Embedding table or output head that the checkpoint leaves unquantized.

    A table without a tied head needs lookups only and is left to vLLM. A head that is tied to a
    table of ours delegates to that table's method.
    """

    kind = LayerKind.HEAD

    def __init__(self, prefix: str, model: ModelPreparation) -> None:
        super().__init__(prefix, model)
        self.heads = TiedHeads(prefix)
        self.table: Any = None
        self.reader = ""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        self.reader = compat.reader_of_tables()

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Tie the head ``layer`` to the table. Returns the layer to be used as the head."""
        method = getattr(embed_tokens, "quant_method", None)
        if isinstance(method, CompressedEmbeddingMethod):
            del layer.weight
            layer.quant_method = TiedHeadMethod(embed_tokens)
            method.heads.add(layer, self.prefix)
            return layer
        if not hasattr(embed_tokens, "weight"):
            raise NotImplementedError(
                f"{self.prefix}: it is tied to {embed_tokens.prefix or 'the embedding table'}, "
                f"whose {type(method).__name__} has no natural weight to share"
            )
        layer.weight = embed_tokens.weight
        if method is None:  # a plain table, as Whisper's: it looks up in the natural weight
            self.plain_table = embed_tokens
            return layer
        if type(method) is UnquantizedEmbeddingMethod:  # the model's table has no quant_method
            method = type(self)(embed_tokens.prefix, self.model)
            method.reader, method.dummy = self.reader, self.dummy
            embed_tokens.quant_method = method
        if isinstance(method, CompressedUnquantizedEmbeddingMethod):
            method.heads.add(layer, self.prefix)
            self.table = embed_tokens
        return layer

    def settle(self, layers: Set[torch.nn.Module]) -> None:
        self.heads.keep(layers)

    def absent(self, layer: Any, arrived: Sequence[tuple[str, Any]]) -> str:
        tied = self.table is not None or self.plain_table is not None
        return "" if tied else super().absent(layer, arrived)

    @property
    def plan_name(self) -> str:
        return self.heads.plan_name

    def plan_note(self, *, lookup: bool) -> str:
        if self.plain_table is not None:
            return "tied: the embedding table looks up in the natural weight"
        if not self.heads.names:
            return f"the natural weight stays for {self.reader}" if self.reader else ""
        kept = f", which stays for {self.reader}" if self.reader else ""
        where = "it" if lookup else f"the natural weight{kept}"
        return f"tied: {self.heads.table or 'the embedding table'} looks up in {where}"

    def could_take(self, layer: Any) -> bool:
        return self.is_ours(layer) and super().could_take(layer)

    def is_ours(self, layer: Any) -> bool:
        """Whether ``layer`` has the weight of a head: neither only looked up nor tied."""
        if self.table is not None:
            return False
        return bool(self.heads.layers) or isinstance(layer, ParallelLMHead)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.table is not None:
            return
        if self.is_ours(layer):
            super().process_weights_after_loading(layer)
            return
        UnquantizedEmbeddingMethod.process_weights_after_loading(self, layer)

    def context(self, layer: Any) -> LayerContext:
        lookup = bool(self.heads.layers) and not self.reader
        return replace(self.heads.context(layer, layer.weight.dtype), lookup=lookup)

    def drop_weight(self, layer: Any) -> None:
        assert self.prepared is not None
        if self.reader or (self.heads.layers and not self.prepared.looks_up):
            return
        weight = self.stand_in(layer)
        for each in (layer, *self.heads.layers):
            each.weight = weight

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """input_ [...] → rows [..., K]."""
        if self.prepared is None or not self.prepared.looks_up:
            return UnquantizedEmbeddingMethod.embedding(self, layer, input_)
        return self.prepared.embedding(layer, input_)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] → [..., N]."""
        if self.table is not None:
            return self.table.quant_method.apply(self.table, x, bias)
        return super().apply(layer, x, bias)
