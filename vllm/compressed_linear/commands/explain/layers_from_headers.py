# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a checkpoint from its headers alone, if vLLM has no class for the model.

Layers have the checkpoint's names, and fused layers appear as their members.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers, last_word
from vllm.compressed_linear.checkpoint.shard import ShardSource, dense_shard
from vllm.compressed_linear.commands.explain.layers import ModelLayer, ModelLayers
from vllm.compressed_linear.commands.explain.left import LeftToVllm
from vllm.compressed_linear.formats.base import Format
from vllm.compressed_linear.formats.file_view import FileView
from vllm.compressed_linear.formats.resolution import Delegated, LayerKind, Unquantized
from vllm.compressed_linear.spec.elements import dtype_name
from vllm.compressed_linear.spec.scheme import CheckpointScheme, Role, StoredTensor


def layers_from_headers(
    headers: Headers, model_config: Mapping[str, Any], read_by: Format, dtype: str
) -> ModelLayers:
    """One layer for each module with a matrix. ``dtype``: of the activations; "auto" is what
    config.json says."""
    file = FileView(headers, read_by.marker_tensors)
    stated = model_config.get("dtype") or model_config.get("torch_dtype") or "bfloat16"
    dtype = str(stated) if dtype == "auto" else dtype
    activations = getattr(torch, dtype)
    model = ModelLayers(headers=headers, dtype=dtype_name(activations))
    experts: dict[str, int] = {}
    for module, names in headers.modules.items():
        kind = _kind(module)
        tensors = {name: headers[f"{module}.{name}" if module else name] for name in names}
        bias = "bias" in tensors
        lookup = kind is LayerKind.EMBEDDING
        bias_dtype = model.dtype if bias else None
        context = LayerContext(model.dtype, model.dtype, bias_dtype, lookup=lookup)
        nbytes = sum(header.nbytes for header in tensors.values())
        if ".experts." in f".{module}.":  # as many as tens of thousands: not asked for one by one
            mixture = f"{f'.{module}.'.partition('.experts.')[0]}.experts".strip(".")
            experts[mixture] = experts.get(mixture, 0) + nbytes
            continue
        found = read_by.resolve(module, kind, file)
        if isinstance(found, Delegated):
            model.left.append(LeftToVllm(module, str(kind), "", found.reason, nbytes=nbytes))
        elif isinstance(found, CheckpointScheme) and (shape := _shape(found, tensors)):
            n, k = shape
            source = ShardSource(module, found, n, k, 0, n, 0, k)
            model.layers.append(ModelLayer(module, module, kind, context, (source,)))
        elif isinstance(found, Unquantized) and _is_linear(module, tensors):
            n, k = tensors["weight"].shape
            shard = dense_shard(module, torch.empty(n, k, dtype=activations, device="meta"))
            model.layers.append(
                ModelLayer(module, module, kind, context, dense=shard, reasons=(found.reason,))
            )
    model.left += [
        LeftToVllm(name, "experts", "", "the experts of a mixture", nbytes=nbytes)
        for name, nbytes in experts.items()
    ]
    return model


def _kind(module: str) -> LayerKind:
    """Kind of a module, by its name."""
    if last_word(module) == "lm_head":
        return LayerKind.HEAD
    return LayerKind.EMBEDDING if "embed" in last_word(module) else LayerKind.LINEAR


def _is_linear(module: str, tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether it is a matrix and, by its name, not an embedding table."""
    weight = tensors.get("weight")
    return weight is not None and len(weight.shape) == 2 and "embed" not in module


def _shape(scheme: CheckpointScheme, tensors: Mapping[str, TensorHeader]) -> tuple[int, int] | None:
    """(N, K) for which the codes have their shape on disk; None if nothing fits."""
    codes = next(t for t in scheme.tensors if t.role is Role.CODES)
    header = tensors.get(codes.name)
    if header is None or codes.interleave or len(header.shape) != len(codes.axes):
        return None
    known = _unpacked_axes(scheme, tensors)
    for packing in codes.packings:
        extents = dict(known)
        for axis, stored in zip(codes.axes, header.shape, strict=True):
            if packing is None or axis != packing.axis:
                extents[str(axis)] = stored
            else:
                extents.setdefault(str(axis), int(stored * packing.pack_factor))
        extents["G"] = scheme.weight.groups(extents["K"])
        if _fits(codes, header, extents):
            return extents["N"], extents["K"]
    return None


def _unpacked_axes(scheme: CheckpointScheme, tensors: Mapping[str, TensorHeader]) -> dict[str, int]:
    """Lengths of N and K according to tensors without a packing."""
    known: dict[str, int] = {}
    for stored in scheme.tensors:
        header = tensors.get(stored.name)
        if header is None or stored.packing is not None or stored.role is Role.SHAPE:
            continue
        for axis, length in zip(stored.axes, header.shape, strict=False):
            if axis in ("N", "K"):
                known[str(axis)] = length
    return known


def _fits(stored: StoredTensor, header: TensorHeader, extents: dict[str, int]) -> bool:
    try:
        stored.packing_of(header.shape, extents)
    except ValueError:
        return False
    return True
