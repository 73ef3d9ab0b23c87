# SPDX-License-Identifier: Apache-2.0
"""Layers that a model's class builds without asking the quantization config for a method.

Many classes of vLLM build their embedding table or output head so, and some the linear layers that
encode images and sound. If the checkpoint quantizes one of them, its method is replaced before
weights are loaded; other layers are refused by name.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration import compat_loading
from vllm.compressed_linear.integration.config import CompressedLinearConfig
from vllm.compressed_linear.integration.embedding import (
    CompressedEmbeddingMethod,
    TiedHeadMethod,
)
from vllm.compressed_linear.integration.linear import CompressedLinearMethod


def ask_for_all(model: torch.nn.Module, config: CompressedLinearConfig) -> dict[str, str]:
    """Give every table, head and linear layer that sees a method of ``config`` if the checkpoint
    quantizes it. Idempotent.

    Returns the modules whose tensors the model's loader has to be given under other names: module
    in the files → in the model. A class that renames its table may rename its plain weight only.
    Raises ``ConfigError`` for other layers that the checkpoint quantizes and the model's class
    builds as if it did not: nothing would load their codes, or codes would be taken for weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    layers: dict[str, Any] = dict(model.named_modules())
    weight_of = compat_loading.renaming_of_weights(model)
    moved = {}
    for name in list(config.file.quantized_modules):
        if ".experts." in name:
            continue  # as many as hundreds of thousands, and their layer has asked
        path = name if name in layers else weight_of(name)
        layer = layers.get(path)
        if layer is None:
            continue
        if path != name and isinstance(layer, VocabParallelEmbedding):
            moved[config.file.names_of(name)[-1]] = path
        if not _built_unquantized(layer, name, config):
            continue
        if not isinstance(layer, VocabParallelEmbedding) and not compat_loading.is_linear_that_sees(
            model, path, layer
        ):
            raise _never_asked(model, name, layer, config)
        _ask(model, name, layer, config)
    return moved


def _built_unquantized(layer: Any, name: str, config: CompressedLinearConfig) -> bool:
    """Whether ``layer`` has a natural weight and no parameter for codes."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    method = getattr(layer, "quant_method", None)
    parameters = dict(layer.named_parameters(recurse=False))
    codes = (config.file.tensors_on_disk(name) or set()) & set(config.file.marker_tensors)
    return (
        "weight" in parameters
        and not codes & parameters.keys()
        and (
            method is None
            or isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)
        )
    )


def _never_asked(
    model: torch.nn.Module, name: str, layer: Any, config: CompressedLinearConfig
) -> ConfigError:
    found = config.file.tensors_on_disk(name) or set()
    codes = min(found & set(config.file.marker_tensors), default="weight")
    header = config.file.header(name, codes)
    file = "the checkpoint" if header is None else header.file
    return ConfigError(
        f"{name}: {file} holds {config.file.names_of(name)[-1]}.{codes}, but vLLM's "
        f"{type(model).__name__} builds this {type(layer).__name__} without quantization, so the "
        "codes have no place in it; leave this layer unquantized when the checkpoint is made, or "
        "put its dequantized weight into the file"
    )


def _ask(model: Any, name: str, layer: Any, config: CompressedLinearConfig) -> None:
    """Replace the method of one layer, and of the heads that are tied to it if it is a table."""
    weight = layer.weight
    tied = [
        (path, other)
        for path, other in model.named_modules()
        if other is not layer and getattr(other, "weight", None) is weight
    ]
    method = config.get_quant_method(layer, name)
    if not isinstance(method, CompressedLinearMethod):
        raise _never_asked(model, name, layer, config)
    del layer.weight
    layer.quant_method = method
    method.create_weights(
        layer,
        getattr(layer, "input_size_per_partition", layer.input_size),
        layer.output_partition_sizes,
        layer.input_size,
        layer.output_size,
        params_dtype=layer.params_dtype,
        weight_loader=layer.weight_loader,
    )
    compat_loading.record_layout(layer)
    for path, head in tied:
        if not isinstance(method, CompressedEmbeddingMethod):
            raise _never_asked(model, name, layer, config)
        del head.weight
        head.quant_method = TiedHeadMethod(layer)
        method.heads.add(head, path)
        compat_loading.record_layout(head)
