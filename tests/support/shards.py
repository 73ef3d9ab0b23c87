# SPDX-License-Identifier: Apache-2.0
"""Shards of checkpoints, loaded through the parameters that vLLM would load into."""

from __future__ import annotations

import json
from typing import Any

import torch

from tests.support.checkpoints import (
    checkpoint,
    checkpoint_reference,
)
from tests.support.described import Described
from tests.support.float_models import Store, Stored
from vllm.compressed_linear.checkpoint.describe import LayerContext
from vllm.compressed_linear.checkpoint.file_header import TensorHeader
from vllm.compressed_linear.checkpoint.headers import Headers
from vllm.compressed_linear.checkpoint.parameter import collect_shards, create_parameters
from vllm.compressed_linear.checkpoint.parts import Part, refine
from vllm.compressed_linear.checkpoint.shard import LoadedShard, ShardSource
from vllm.compressed_linear.formats.resolution import LayerKind
from vllm.compressed_linear.spec.elements import dtype_name, widen_scale
from vllm.compressed_linear.spec.scheme import CheckpointScheme


def read_config(name: str) -> Described:
    """The format of a checkpoint and what its files have."""
    path = checkpoint(name)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    return Described.of(config).with_file(path)


def linears(name: str) -> list[str]:
    """Names of the linear layers whose dequantized weights are known."""
    return sorted(
        key.removesuffix(".corner") for key in checkpoint_reference(name) if key.endswith(".corner")
    )


def kind_of(linear: str) -> LayerKind:
    return LayerKind.HEAD if linear == "lm_head" else LayerKind.LINEAR


def source_of(
    linear: str, scheme: CheckpointScheme, n: int, k: int, part: dict[str, int] | None = None
) -> ShardSource:
    whole = {"n_start": 0, "n": n, "k_start": 0, "k": k}
    return ShardSource(linear, scheme, n, k, **{**whole, **(part or {})})


def load(source: ShardSource, tensors: dict[str, torch.Tensor]) -> LoadedShard:
    """One shard through the parameters that vLLM would load into."""
    parameters = create_parameters([source], source.name)
    for name, parameter in parameters.items():
        tensor = tensors.get(f"{source.name}.{name}")
        if tensor is not None:
            parameter.weight_loader(parameter, tensor)
    return collect_shards(parameters, [source])[0]


def in_file_order(part: Part) -> torch.Tensor:
    """fp32 [N, K] of the rows in standard layout, with channels put back."""
    rows = part.weights.rows(0, part.weights.n)
    size = part.descriptor.group_size
    values = part.descriptor.weight.element.decode(rows.codes)
    if rows.zero is not None:
        values = values - rows.zero.to(torch.float32).repeat_interleave(size, 1)
    if rows.scale is not None:
        values = values * widen_scale(rows.scale).repeat_interleave(size, 1)
    if part.weights.row_scale is not None:
        values = values * part.weights.row_scale.unsqueeze(1)
    order = part.weights.permutation
    if order is None:
        return values
    out = torch.zeros(part.weights.n, part.descriptor.in_features)
    kept = order >= 0
    out[:, order[kept].to(torch.int64)] = values[:, kept]
    return out


MODULE = "a.x_proj"


def described_by(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Described:
    """What a format sees of a file with ``tensors``."""
    headers = Headers(
        {
            key: TensorHeader(dtype_name(t.dtype), tuple(t.shape), t.nbytes, "model.safetensors")
            for key, t in tensors.items()
        }
    )
    return Described.of(config, headers)


def stored_by(store: Store, n: int, k: int) -> tuple[Stored, dict[str, torch.Tensor]]:
    """A weight [n, k] of ``MODULE``, and its tensors in a file."""
    stored = store(MODULE, n, k, torch.Generator().manual_seed(1))
    assert stored is not None
    return stored, {f"{MODULE}.{key}": value for key, value in stored.tensors.items()}


def assert_ranks_hold_the_whole(
    config: dict[str, Any], store: Store, axis: str, ranks: int, n: int, k: int
) -> None:
    """Parts of a weight [n, k] along ``axis``, each loaded as a rank loads it: together they mean
    what the weight does, and each has its own factors of x."""
    stored, tensors = stored_by(store, n, k)
    described = described_by(config, tensors)
    scheme, tensors = described.resolve(MODULE), dict(described.format.restated(tensors.items()))
    assert isinstance(scheme, CheckpointScheme)
    length = (n if axis == "n" else k) // ranks
    parts = []
    for rank in range(ranks):
        part = {f"{axis}_start": rank * length, axis: length}
        shard = load(source_of(MODULE, scheme, n, k, part), tensors)
        (refined,) = refine([shard], LayerContext("float32", "float32"))
        parts.append(refined.weights.dequantize(0, shard.source.n))
        if (factors := stored.tensors.get("pre_quant_scale")) is not None:
            own = factors[rank * length :][:length] if axis == "k" else factors
            assert refined.weights.prescale is not None
            assert torch.equal(refined.weights.prescale.float(), own.float())
    whole = torch.cat(parts, 0 if axis == "n" else 1).double().numpy()
    assert (abs(whole - stored.meaning) <= 1e-6 * abs(stored.meaning)).all()
